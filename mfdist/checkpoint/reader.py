"""Loads a committed step, whole or in parts, and verifies one; each rank reads only the files it needs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdist.checkpoint.damage import Damage, Place, UnsoundFile
from mfdist.checkpoint.dtypes import STORED_DTYPES, dtype_name
from mfdist.checkpoint.folder import AnyFolder
from mfdist.checkpoint.manifest import MANIFEST
from mfdist.checkpoint.step_files import StepFiles, StoredArray, read_stored_array
from mfdist.checkpoint.zarr_format import chunk_offsets
from mfdist.errors import CheckpointError
from mfdist.spec import Region

#: Told (bytes checked, bytes in all) after each file.
OnProgress = Callable[[int, int], None]


def read_parts(files: StepFiles, wanted: Sequence[tuple[StoredArray, Sequence[tuple[Region, Tensor]]]]) -> None:
    """Fill tensors with regions of arrays.

    Args:
        files: the step.
        wanted: arrays with (region, tensor of its shape and of the array's dtype, on any device).

    Raises:
        CheckpointError: a file is missing or not what was saved; the message names file, table and rows. What was
            filled until then stays.

    Cost: each file that holds any of a region is read once, by one of NUM_READERS threads into its buffer.
    """
    tasks: list[tuple[StoredArray, Place, list[_Target]]] = []
    targets: list[_Target] = []
    for array, parts in wanted:
        mine = [_Target(region, tensor) for region, tensor in parts]
        targets += mine
        needed = {name: region for target in mine for name, region in array.grid.files_in(target.region)}
        tasks += [(array, array.place(name, region), mine) for name, region in needed.items()]

    def read(task: tuple[StoredArray, Place, list[_Target]]) -> None:
        array, place, mine = task
        files.require(place, lambda data: _spread(array, place, data, mine))

    for _ in files.each(read, tasks):
        pass  # raises what went wrong
    for target in targets:
        target.deliver()


def read_whole(files: StepFiles, arrays: Mapping[str, StoredArray]) -> dict[str, Tensor]:
    """Return arrays in new tensors, under the names they are given; see `read_parts` for what may fail."""
    tensors = {name: torch.empty(array.grid.shape, dtype=array.dtype) for name, array in arrays.items()}
    read_parts(files, [(array, [(array.grid.region, tensors[name])]) for name, array in arrays.items()])
    return tensors


def verify_step(place: AnyFolder, step: int, on_progress: OnProgress) -> list[Damage]:
    """Compare every file of the step with the manifest, open every array, and see that each row has its file."""
    try:
        opened = StepFiles(place)
    except CheckpointError as error:
        return [Damage(step=step, file=MANIFEST, problem=f"cannot be used: {error}")]
    with opened as files:
        names, arrays = files.manifest.files, set(files.manifest.arrays)
        parents = {name: name.rpartition("/")[0] for name in names if name.endswith("zarr.json")}
        places = [Place(name, parent if parent in arrays else None) for name, parent in parents.items()]
        for path in files.manifest.arrays:
            try:
                places += files.array(path).places()
            except CheckpointError:  # which rows a file holds is unknown; whether it is whole is not
                if f"{path}/zarr.json" not in names:
                    places.append(Place(f"{path}/zarr.json", path))
                places += [Place(name, path) for name in names if name.startswith(f"{path}/c")]
        return _damages(files, places, on_progress)


def _damages(files: StepFiles, places: Sequence[Place], on_progress: OnProgress) -> list[Damage]:
    def check(place: Place) -> str | None:
        document = None if place.path is None else f"{place.path}/zarr.json"
        try:
            files.use(place, partial(read_stored_array, str(place.path)) if place.file == document else len)
        except UnsoundFile as error:
            return str(error)
        return None

    damages, num_bytes = [], 0
    for place, problem in zip(places, files.each(check, places), strict=True):
        if problem is not None:
            damages.append(place.damage(files.manifest.step, problem))
        if place.file in files.manifest.files:
            num_bytes += files.manifest.files[place.file].num_bytes
            on_progress(num_bytes, files.manifest.num_bytes)
    return damages


class _Target:
    """The tensor of a region, seen as rows × columns, which files are spread into."""

    def __init__(self, region: Region, tensor: Tensor) -> None:
        self.region = region
        self._tensor = tensor.detach()
        is_viewable = tensor.ndim == 2 or tensor.is_contiguous()
        self._filled = self._tensor if is_viewable else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._rows = self._filled.view(region.shape)
        # numpy copies in the calling thread and lets others run; torch would start threads of its own in each.
        self._host = (
            self._rows.view(STORED_DTYPES[dtype_name(tensor.dtype)]).numpy() if tensor.device.type == "cpu" else None
        )

    def put(self, region: Region, values: NDArray[Any]) -> None:
        """Take the values of a region, of which any part may lie in this one."""
        mine = self.region.intersection(region)
        if mine.is_empty:
            return
        values = values[_within(region, mine)]
        if self._host is not None:
            self._host[_within(self.region, mine)] = values
        else:
            self._rows[_within(self.region, mine)].copy_(torch.from_numpy(values).view(self._tensor.dtype))

    def deliver(self) -> None:
        """Bring what was filled into the tensor, where that could not be done directly."""
        if self._filled is not self._tensor:
            self._tensor.copy_(self._filled)


def _spread(array: StoredArray, place: Place, data: memoryview, targets: Sequence[_Target]) -> None:
    """Give every target what it wants of a file's chunks."""
    region, grid = place.region, array.grid
    assert region is not None
    dtype = torch.empty(0, dtype=STORED_DTYPES[dtype_name(array.dtype)]).numpy().dtype
    chunk_shape = (grid.rows_per_chunk, grid.columns_per_file)
    for number, offset in enumerate(chunk_offsets(grid, region, data, dtype.itemsize)):
        values = np.frombuffer(data, dtype, math.prod(chunk_shape), offset).reshape(chunk_shape)
        top = region.rows[0] + number * grid.rows_per_chunk
        rows = (top, min(top + grid.rows_per_chunk, region.rows[1]))
        chunk = Region(rows=rows, columns=region.columns)
        for target in targets:
            target.put(chunk, values[: chunk.shape[0], : chunk.shape[1]])


def _within(outer: Region, inner: Region) -> tuple[slice, slice]:
    (top, _), (left, _) = outer.rows, outer.columns
    rows, columns = inner.rows, inner.columns
    return slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)

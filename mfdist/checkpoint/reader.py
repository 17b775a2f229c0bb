"""Reads a committed step back, and says what is damaged; no file is used before its checksum was compared."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfdist.checkpoint.damage import Damage
from mfdist.checkpoint.dtypes import STORED_DTYPES
from mfdist.checkpoint.engine import StoredArray, read_attributes
from mfdist.checkpoint.layout import FILES_AT_ONCE, parse_path
from mfdist.checkpoint.manifest import MANIFEST, Manifest
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import CheckpointError

#: Told (bytes checked, bytes in all) after each file.
OnProgress = Callable[[int, int], None]


def load_step(root: Path, device: torch.device | str) -> CheckpointState:
    """Load everything the step at `root` holds.

    Raises:
        CheckpointError: a file is missing or not what was saved; the message names the file and its table and rows.

    Cost: every file is read twice, the second time from the page cache; beyond the tensors returned, a host copy of
        FILES_AT_ONCE files.
    """
    manifest = Manifest.read(root)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        check = _Check(root, manifest, pool)
        check.require(check.metadata())
        tables: dict[str, dict[str, Tensor]] = {}
        dense: dict[str, Tensor] = {}
        for path in manifest.arrays:
            table, name = parse_path(path)
            tensor = _load_array(check, path, device)
            if table is None:
                dense[name] = tensor
            else:
                tables.setdefault(table, {})[name] = tensor
    return CheckpointState(
        step=manifest.step,
        tables={name: TableState(weight=arrays.pop("weight"), optimizer=arrays) for name, arrays in tables.items()},
        dense=dense,
        attributes=read_attributes(root)["attributes"],
    )


def verify_step(root: Path, step: int, on_progress: OnProgress) -> list[Damage]:
    """Compare every file of the step with the manifest, open every array, and see that each row has its file."""
    try:
        manifest = Manifest.read(root)
    except CheckpointError as error:
        return [Damage(step=step, file=MANIFEST, problem=f"cannot be used: {error}")]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        check = _Check(root, manifest, pool, on_progress)
        damages = list(check.damages(check.metadata()))
        unreadable = {damage.file for damage in damages}
        for path in manifest.arrays:
            metadata = f"{path}/zarr.json"
            try:
                places = _files_of(path, StoredArray(root, path)) if metadata not in unreadable else None
            except CheckpointError as error:
                damages.append(_damage(step, _Place(metadata, path), f"cannot be used: {error}"))
                places = None
            if places is None:  # which rows a file holds is unknown; whether it is whole is not
                places = [_Place(file, path) for file in manifest.files if file.startswith(f"{path}/c")]
            damages += check.damages(places)
    return damages


@dataclass(frozen=True)
class _Place:
    """A file, and which part of which array it holds."""

    file: str
    path: str | None = None
    rows: tuple[int, int] | None = None


class _Check:
    """Compares files with the manifest, several at a time."""

    def __init__(
        self, root: Path, manifest: Manifest, pool: ThreadPoolExecutor, on_progress: OnProgress | None = None
    ) -> None:
        self.root = root
        self.manifest = manifest
        self._pool = pool
        self._on_progress = on_progress
        self._num_bytes = 0

    def metadata(self) -> list[_Place]:
        """Return the files that describe groups and arrays."""
        arrays = set(self.manifest.arrays)
        parents = {file: file.rpartition("/")[0] for file in self.manifest.files if file.endswith("zarr.json")}
        return [_Place(file, parent if parent in arrays else None) for file, parent in parents.items()]

    def damages(self, places: Iterable[_Place]) -> Iterator[Damage]:
        places = list(places)
        problems = self._pool.map(lambda place: self.manifest.problem_of(self.root, place.file), places)
        for place, problem in zip(places, problems, strict=True):
            if problem is not None:
                yield _damage(self.manifest.step, place, problem)
            if self._on_progress is not None and place.file in self.manifest.files:
                self._num_bytes += self.manifest.files[place.file].num_bytes
                self._on_progress(self._num_bytes, self.manifest.num_bytes)

    def require(self, places: Iterable[_Place]) -> None:
        """Raise CheckpointError for the first damage."""
        for damage in self.damages(places):
            raise CheckpointError(
                f"a checkpoint must be what was saved; {damage}, in {self.root}; "
                "load another step, or copy the file from elsewhere."
            )


def _damage(step: int, place: _Place, problem: str) -> Damage:
    table, array = parse_path(place.path) if place.path is not None else (None, None)
    return Damage(step=step, file=place.file, problem=problem, table=table, array=array, rows=place.rows)


def _files_of(path: str, array: StoredArray) -> list[_Place]:
    return [_Place(f"{path}/{name}", path, (start, stop)) for name, start, stop in array.blocks.files()]


def _load_array(check: _Check, path: str, device: torch.device | str) -> Tensor:
    array = StoredArray(check.root, path)
    places = _files_of(path, array)
    name = array.attributes["dtype"]
    stored = STORED_DTYPES[name]
    result = torch.empty(array.blocks.shape, dtype=getattr(torch, name), device=device)
    for first in range(0, len(places), FILES_AT_ONCE):
        batch = places[first : first + FILES_AT_ONCE]
        check.require(batch)
        start, stop = _span(batch)
        target = result[start:stop] if array.blocks.shape else result
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        try:
            array.read_into(start, host.view(stored).numpy())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"a checkpoint must stay in place while it is read; {path} in {check.root} cannot be read ({error}); "
                "load a step that is not being removed."
            ) from error
        if host is not target:
            target.copy_(host)
    return result


def _span(places: list[_Place]) -> tuple[int, int]:
    spans = [place.rows for place in places if place.rows is not None]
    return spans[0][0], spans[-1][1]

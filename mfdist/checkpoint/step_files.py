"""The files of a committed step, each read whole, once, and compared with the manifest before anything uses it."""

import json
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch

from mfdist.checkpoint.checksum import checksum
from mfdist.checkpoint.damage import Place, UnsoundFile
from mfdist.checkpoint.direct_io import PageMemory
from mfdist.checkpoint.folder import AnyFolder, open_folder
from mfdist.checkpoint.grid import FileGrid
from mfdist.checkpoint.manifest import Manifest
from mfdist.checkpoint.zarr_format import read_array_document
from mfdist.errors import CheckpointError
from mfdist.spec import Region

#: Threads that read; each has a buffer as large as the largest file it read.
NUM_READERS = 4

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredArray:
    """How an array of a step is stored."""

    path: str
    grid: FileGrid
    dtype: torch.dtype

    def places(self) -> list[Place]:
        """Return its files."""
        return [self.place(name, region) for name, region in self.grid.files()]

    def place(self, name: str, region: Region) -> Place:
        """Return one of its files."""
        return Place(f"{self.path}/{name}", self.path, region, self.grid.region.columns[1])


def read_stored_array(path: str, document: memoryview) -> StoredArray:
    """Return what an array's zarr.json says.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it makes no sense.
    """
    grid, attributes = read_array_document(bytes(document))
    return StoredArray(path, grid, getattr(torch, attributes["dtype"]))


class StepFiles:
    """A committed step, open for reading until the `with` block ends; any thread may read.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of a newer format.
    """

    def __init__(self, place: AnyFolder) -> None:
        self.folder = open_folder(place)
        self.root = self.folder.path
        self.manifest = Manifest.read(self.folder)
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="mfdist-checkpoint-read")
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that the run saved.

        Raises:
            CheckpointError: their file is damaged.
        """
        return self.require(Place("zarr.json"), lambda data: json.loads(bytes(data))["attributes"]["attributes"])

    def arrays(self, paths: Collection[str]) -> dict[str, StoredArray]:
        """Return how arrays are stored, after checking the documents of all groups as well.

        Raises:
            CheckpointError: a document is damaged.
        """
        inner = {f"{path}/zarr.json" for path in self.manifest.arrays}
        groups = [Place(name) for name in self.manifest.files if name.endswith("zarr.json") and name not in inner]
        for _ in self.each(lambda place: self.require(place, len), groups):
            pass  # raises what is wrong
        return dict(zip(paths, self.each(self.array, list(paths)), strict=True))

    def array(self, path: str) -> StoredArray:
        """Return how an array is stored.

        Raises:
            CheckpointError: its document is damaged.
        """
        return self.require(Place(f"{path}/zarr.json", path), lambda data: read_stored_array(path, data))

    def use(self, place: Place, act: Callable[[memoryview], Result]) -> Result:
        """Read a file, compare it with the manifest, and return `act` of its contents, which it may not keep.

        Raises:
            UnsoundFile: it is not what was saved, or `act` cannot make sense of it.
        """
        entry = self.manifest.files.get(place.file)
        if entry is None:
            raise UnsoundFile("is not in the manifest")
        try:
            data = self._read(place.file, entry.num_bytes)
        except FileNotFoundError:
            raise UnsoundFile("is missing") from None
        except OSError as error:
            raise UnsoundFile(f"cannot be read ({error.strerror})") from error
        if (found := checksum(data)) != entry.crc32c:
            raise UnsoundFile(f"has crc32c {found}, not the {entry.crc32c} in the manifest")
        try:
            return act(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsoundFile(f"cannot be used: {error}") from error

    def require(self, place: Place, act: Callable[[memoryview], Result]) -> Result:
        """Do as `use`, but raise CheckpointError, which names file, table and rows."""
        try:
            return self.use(place, act)
        except UnsoundFile as error:
            raise CheckpointError(
                f"a checkpoint must be what was saved; {place.damage(self.manifest.step, str(error))}, in {self.root}; "
                "copy the file from elsewhere, load another step, or delete this one to go on from the one before."
            ) from error

    def each(self, act: Callable[[Any], Result], items: Sequence[Any]) -> Iterator[Result]:
        """Yield `act` of every item in order, several at a time."""
        return self._pool.map(act, items)

    def _read(self, name: str, num_bytes: int) -> memoryview:
        """Return a file's contents, in a buffer that this thread's next read overwrites."""
        if not hasattr(self._local, "memory"):
            self._local.memory = PageMemory()
        buffer: memoryview = self._local.memory.of(num_bytes)
        if (found := self.folder.read_into(name, buffer)) != num_bytes:
            raise UnsoundFile(f"has {found} bytes, not the {num_bytes} in the manifest")
        return buffer[:num_bytes]

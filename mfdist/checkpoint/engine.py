"""The only file that imports zarr: writes a step's arrays durably and reads them back, block by block."""

import asyncio
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.buffer import cpu
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, WrapperStore

from mfdist.checkpoint.durability import fsync
from mfdist.checkpoint.layout import RowBlocks
from mfdist.checkpoint.manifest import FileEntry, checksum
from mfdist.errors import CheckpointError

#: What zarr raises for metadata it cannot make sense of.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


class _DurableStore(WrapperStore[LocalStore]):
    """A local store that knows its files' checksums and has them put on disk while the next ones are written.

    The checksum is taken from memory, so that it also covers the way to the disk.
    """

    def __init__(self, store: LocalStore, pool: ThreadPoolExecutor) -> None:
        super().__init__(store)
        self.files: dict[str, FileEntry] = {}
        self.syncs: list[Future[None]] = []
        self._pool = pool

    def _with_store(self, store: LocalStore) -> "_DurableStore":
        durable = type(self)(store, self._pool)
        durable.files = self.files
        durable.syncs = self.syncs
        return durable

    async def set(self, key: str, value: Buffer) -> None:
        await super().set(key, value)
        data = value.as_numpy_array()
        self.files[key] = FileEntry(data.nbytes, await asyncio.to_thread(checksum, data))
        self.syncs.append(self._pool.submit(fsync, self._store.root / key))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if key not in self.files:
            await self.set(key, value)


class StepWriter:
    """Writes one new store at `root`; not thread-safe.

    Call order: once the constructor, then `write_array` for each array, then `finish`. Any call may raise OSError,
    after which the store is of no use. `pool` waits for the disk.
    """

    def __init__(self, root: Path, attributes: Mapping[str, Any], pool: ThreadPoolExecutor) -> None:
        self._store = _DurableStore(LocalStore(root), pool)
        self._group = zarr.create_group(self._store, attributes=dict(attributes), zarr_format=3)

    def write_array(
        self,
        path: str,
        blocks: RowBlocks,
        dtype: np.dtype[Any],
        attributes: Mapping[str, Any],
        values: Iterable[tuple[int, NDArray[Any]]],
    ) -> None:
        """Create the array at `path` and write `values`: (first row, contiguous rows), aligned to files."""
        width = tuple(max(1, dim) for dim in blocks.shape[1:])
        is_sharded = blocks.rows_per_file > blocks.rows_per_chunk
        array = self._group.create_array(
            path,
            shape=blocks.shape,
            dtype=dtype,
            chunks=(blocks.rows_per_chunk, *width) if blocks.shape else (),
            shards=(blocks.rows_per_file, *width) if is_sharded else None,
            # Trained fp32 rows do not compress (zstd: 0.92 of the size at a quarter of the speed).
            compressors=None,
            filters=None,
            fill_value=dtype.type(0),
            attributes=dict(attributes),
            # No directory a file, as "c/0/0" would have.
            chunk_key_encoding={"name": "default", "separator": "."},
            # Otherwise chunks of zeros would be left out, negative zeros among them, and coverage could not be checked.
            config={"write_empty_chunks": True},
        )
        for start, rows in values:
            array[slice(start, start + len(rows)) if blocks.shape else ...] = rows

    def finish(self) -> dict[str, FileEntry]:
        """Wait until every file is on disk; return them by their paths in the store."""
        for sync in self._store.syncs:
            sync.result()
        return self._store.files


class StoredArray:
    """An array of a committed step, open for reading; safe to read from several threads.

    Raises:
        CheckpointError: there is no such array, or zarr cannot make sense of its metadata.
    """

    def __init__(self, root: Path, path: str) -> None:
        try:
            self._array = zarr.open_array(_read_only(root), path=path, mode="r", zarr_format=3)
            shape, chunks = self._array.shape, self._array.chunks
            files = self._array.shards or chunks
        except _UNREADABLE as error:
            raise CheckpointError(
                f"an array of a checkpoint must open with zarr; {root / path} does not ({error}); use another step."
            ) from error
        self.blocks = RowBlocks(shape, chunks[0], files[0]) if shape else RowBlocks((), 1, 1)
        self.attributes: Mapping[str, Any] = self._array.attrs.asdict()

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, contiguous and of the stored dtype, with the rows from `start` on."""
        selection = slice(start, start + len(out)) if self.blocks.shape else ...
        self._array.get_basic_selection(selection, out=cpu.NDBuffer.from_numpy_array(out))


def read_attributes(root: Path) -> Mapping[str, Any]:
    """Return the attributes of the store's root group.

    Raises:
        CheckpointError: zarr cannot make sense of it.
    """
    try:
        return zarr.open_group(_read_only(root), mode="r", zarr_format=3).attrs.asdict()
    except _UNREADABLE as error:
        raise CheckpointError(
            f"a checkpoint must open with zarr; {root} does not ({error}); use another step."
        ) from error


def _read_only(root: Path) -> Store:
    return LocalStore(root, read_only=True)

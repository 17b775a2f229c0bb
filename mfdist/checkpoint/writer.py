"""One rank's part of writing a step's files: taken from the tensors, checksummed, put on disk or shared."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfdist.checkpoint.checksum import checksum, crc32c, digest
from mfdist.checkpoint.direct_io import PageMemory
from mfdist.checkpoint.division import FilePlan
from mfdist.checkpoint.dtypes import STORED_DTYPES, dtype_name
from mfdist.checkpoint.folder import Folder
from mfdist.checkpoint.holding import Holding
from mfdist.checkpoint.manifest import FileEntry, Manifest
from mfdist.checkpoint.zarr_format import index_of
from mfdist.spec import Region

#: Threads, each with one file in memory.
NUM_WRITERS = 4
#: Where ranks leave their pieces of each other's files; gone before the step is committed.
PIECES = ".pieces"


@dataclass(frozen=True)
class Base:
    """A committed step whose files are shared where they hold the same bytes."""

    folder: Folder
    manifest: Manifest


class RankWriter:
    """Writes the files that fall to one rank.

    Call order: `write_pieces`; when all ranks have done so, `write_files`; `close` in any case. An error of the disk is
    raised as OSError by the call that waits for it; what was written is of no use then.
    """

    def __init__(
        self, folder: Folder, rank: int, holdings: Mapping[str, Holding], plans: Sequence[FilePlan], base: Base | None
    ) -> None:
        self.files: dict[str, FileEntry] = {}  # what this rank has put into the step
        self.num_written_bytes = 0
        self._folder = folder
        self._rank = rank
        self._holdings = holdings
        self._grids = {path: holding.grid for path, holding in holdings.items()}
        self._plans = plans
        self._base = base
        self._pool = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="mfdist-checkpoint")
        self._tasks: list[Future[None]] = []
        self._scratch = threading.local()
        self._failed = threading.Event()
        self._lock = threading.Lock()

    def write_pieces(self) -> None:
        """Put this rank's pieces of files that lie across ranks within reach of their owners; begin with its own files.

        Pieces come first, so that no rank waits long for another's.
        """
        self._folder.make(sorted({plan.path for plan in self._plans}))
        across = [plan for plan in self._plans if len(plan.pieces) > 1]
        self._folder.make(sorted({f"{PIECES}/{plan.path}" for plan in across}))
        for plan in across:
            for number, piece in plan.borrowed():
                if piece.rank == self._rank:
                    self._submit(self._write_piece, plan, number)
        pieces, self._tasks = self._tasks, []
        for plan in self._plans:
            if len(plan.pieces) == 1:
                self._submit(self._write_file, plan)
        for task in pieces:
            task.result()

    def write_files(self) -> None:
        """Put together the files across ranks that this one owns, and wait until all its files are on disk."""
        for plan in self._plans:
            if len(plan.pieces) > 1 and plan.owner == self._rank:
                self._submit(self._write_file, plan)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()
        self._folder.sync()

    def write_documents(self, documents: Mapping[str, bytes]) -> None:
        """Write small files, which last once the folder is synced."""

        def write(item: tuple[str, bytes]) -> None:
            name, content = item
            self._folder.write(name, content)
            self._record(name, FileEntry(len(content), checksum(content)), len(content))

        self._folder.make(sorted({name.rpartition("/")[0] for name in documents}))
        for _ in self._pool.map(write, documents.items()):
            pass  # raises what the first one raises

    def close(self) -> None:
        """End the threads; what they have not begun is not done."""
        self._failed.set()
        self._pool.shutdown(wait=True)
        self._folder.close()

    def _submit(self, act: Callable[..., None], *args: object) -> None:
        def task() -> None:
            if self._failed.is_set():
                return  # another failed, and its error is what is raised
            try:
                act(*args)
            except BaseException:
                self._failed.set()
                raise

        self._tasks.append(self._pool.submit(task))

    def _write_piece(self, plan: FilePlan, number: int) -> None:
        piece = plan.pieces[number]
        values = self._holdings[plan.path].block(piece.part, piece.region)
        target = self._buffer(values.dtype, values.shape)
        _copy(values, target)
        self._folder.write(_piece_name(plan, number), _bytes_of(target), is_lasting=False)

    def _write_file(self, plan: FilePlan) -> None:
        grid, holding = self._grids[plan.path], self._holdings[plan.path]
        num_rows = grid.num_chunks(plan.region) * grid.rows_per_chunk
        target = self._buffer(holding.dtype, (num_rows, grid.columns_per_file))
        if target.shape != plan.region.shape:
            target.zero_()  # padding
        for number, piece in enumerate(plan.pieces):
            within = target[_inside(plan.region, piece.region)]
            if piece.rank == self._rank:
                _copy(holding.block(piece.part, piece.region), within)
            else:
                stored = torch.frombuffer(bytearray(self._folder.read(_piece_name(plan, number))), dtype=holding.dtype)
                _copy(stored.view(within.shape), within)
        content, index = _bytes_of(target), index_of(grid, plan.region, holding.item_bytes)
        entry = FileEntry(len(content) + len(index), f"{crc32c(index, crc32c(content)):08x}", digest(content))
        is_shared = self._share(plan.name, entry)
        if not is_shared:
            self._folder.write(plan.name, content, index)
        self._record(plan.name, entry, 0 if is_shared else entry.num_bytes)

    def _share(self, name: str, entry: FileEntry) -> bool:
        """Give the base's file a second name in this step, if it holds the same; say whether it does."""
        if self._base is None or self._base.manifest.files.get(name) != entry:
            return False
        return self._folder.share(name, self._base.folder)

    def _buffer(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return this thread's memory as a tensor; its next call uses it again."""
        num_bytes = dtype.itemsize * shape[0] * shape[1]
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = PageMemory()
        memory = self._scratch.memory.of(num_bytes)[:num_bytes]
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(*shape)

    def _record(self, name: str, entry: FileEntry, num_written: int) -> None:
        with self._lock:
            self.files[name] = entry
            self.num_written_bytes += num_written


def _piece_name(plan: FilePlan, number: int) -> str:
    return f"{PIECES}/{plan.name}~{number}"


def _copy(values: Tensor, target: Tensor) -> None:
    if values.device.type == "cpu":  # numpy copies in this thread; torch would set up a team of its own for each block
        stored = STORED_DTYPES[dtype_name(values.dtype)]
        np.copyto(target.view(stored).numpy(), values.view(stored).numpy())
    else:
        target.copy_(values)


def _bytes_of(block: Tensor) -> memoryview:
    return block.view(torch.uint8).numpy().data.cast("B")


def _inside(outer: Region, inner: Region) -> tuple[slice, slice]:
    (top, _), (left, _) = outer.rows, outer.columns
    rows, columns = inner.rows, inner.columns
    return slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)

"""One rank's part of writing a step's files: copied from the tensors, checksummed, put on disk or shared."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mfdist.checkpoint.buffers import BlockBuffers
from mfdist.checkpoint.checksum import checksum, crc32c, digest
from mfdist.checkpoint.division import FilePlan
from mfdist.checkpoint.durability import write_file
from mfdist.checkpoint.holding import Holding
from mfdist.checkpoint.manifest import FileEntry, Manifest
from mfdist.checkpoint.zarr_format import index_of
from mfdist.spec import Region

#: Threads that wait for the disk; they hold no more memory than the buffers they were given.
NUM_WRITERS = 8
#: Where ranks leave their pieces of each other's files; gone before the step is committed.
PIECES = ".pieces"


@dataclass(frozen=True)
class Base:
    """A committed step whose files are shared where they hold the same bytes."""

    root: Path
    manifest: Manifest


class RankWriter:
    """Writes the files that fall to one rank.

    Call order: `copy`, after which the tensors may change; `flush`; when all ranks have flushed, `complete`; `close` in
    any case. The first two and the last two may be called from two threads. An error of the disk is raised by the call
    that waits for it, as OSError; the files are of no use then.
    """

    def __init__(
        self,
        root: Path,
        rank: int,
        holdings: Mapping[str, Holding],
        plans: Sequence[FilePlan],
        buffers: BlockBuffers,
        base: Base | None,
    ) -> None:
        self.files: dict[str, FileEntry] = {}  # what this rank has put into the step
        self.num_written_bytes = 0
        self._root = root
        self._rank = rank
        self._holdings = holdings
        self._grids = {path: holding.grid for path, holding in holdings.items()}
        self._plans = plans
        self._buffers = buffers
        self._base = base
        self._pool = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="mfdist-checkpoint")
        self._tasks: list[Future[None]] = []
        self._failed = threading.Event()
        self._lock = threading.Lock()

    def copy(self) -> None:
        """Copy everything into buffers, waiting for the disk only when the buffers are full."""
        for directory in {plan.path for plan in self._plans}:
            (self._root / directory).mkdir(parents=True, exist_ok=True)
        for directory in {plan.path for plan in self._plans if len(plan.pieces) > 1}:
            (self._root / PIECES / directory).mkdir(parents=True, exist_ok=True)
        for plan in self._plans:
            if self._failed.is_set():
                break
            holding = self._holdings[plan.path]
            for number, piece in enumerate(plan.pieces):
                if piece.rank != self._rank:
                    continue
                values = holding.block(piece.part, piece.region)
                if len(plan.pieces) == 1:
                    self._submit(self._write_file, plan, self._filled(plan, values))
                else:
                    buffer = self._buffers.take(values.numel() * holding.item_bytes)
                    buffer.view(holding.dtype).view(values.shape).copy_(values)
                    self._submit(self._write_piece, self._piece_path(plan, number), buffer)

    def flush(self) -> None:
        """Wait until everything copied is on disk, this rank's pieces of shared files within reach of their owners."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()

    def complete(self) -> None:
        """Put together the shared files that this rank owns, from everybody's pieces."""
        for plan in self._plans:
            if len(plan.pieces) > 1 and plan.owner == self._rank:
                self._submit(self._join_pieces, plan, self._buffers.take(self._file_bytes(plan)))
        self.flush()

    def write_documents(self, documents: Mapping[str, bytes]) -> None:
        """Write small files, and wait for them."""

        def write(item: tuple[str, bytes]) -> None:
            name, content = item
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
            self._record(name, FileEntry(len(content), checksum(content)), len(content))

        self.each(write, documents.items())

    def each(self, act: Callable[..., None], items: Iterable[object]) -> None:
        """Call `act` with every item, several at a time; raise what the first one raises."""
        for _ in self._pool.map(act, items):
            pass

    def close(self) -> None:
        """Let go of threads and buffers."""
        self._failed.set()
        self._pool.shutdown(wait=True)
        self._tasks = []

    def _submit(self, act: Callable[..., None], *args: object) -> None:
        buffer = args[-1]
        assert isinstance(buffer, Tensor)

        def task() -> None:
            try:
                if not self._failed.is_set():
                    act(*args)
            except BaseException:
                self._failed.set()
                raise
            finally:
                self._buffers.give_back(buffer)

        self._tasks.append(self._pool.submit(task))

    def _filled(self, plan: FilePlan, values: Tensor) -> Tensor:
        """Return a buffer with the chunks of a file that this rank holds whole."""
        buffer = self._buffers.take(self._file_bytes(plan))
        grid = self._grids[plan.path]
        target = buffer.view(values.dtype).view(-1, grid.columns_per_file)
        if target.shape != values.shape:
            buffer.zero_()  # padding
        target[: values.shape[0], : values.shape[1]].copy_(values)
        return buffer

    def _file_bytes(self, plan: FilePlan) -> int:
        grid = self._grids[plan.path]
        num_rows = grid.num_chunks(plan.region) * grid.rows_per_chunk
        return num_rows * grid.columns_per_file * self._holdings[plan.path].item_bytes

    def _write_file(self, plan: FilePlan, buffer: Tensor) -> None:
        content = buffer.numpy().data
        index = index_of(self._grids[plan.path], plan.region, self._holdings[plan.path].item_bytes)
        crc = crc32c(index, crc32c(content))
        entry = FileEntry(len(content) + len(index), f"{crc:08x}", digest(content))
        is_shared = self._share(plan.name, entry)
        if not is_shared:
            write_file(self._root / plan.name, content, index)
        self._record(plan.name, entry, 0 if is_shared else entry.num_bytes)

    def _share(self, name: str, entry: FileEntry) -> bool:
        """Give the base's file a second name in this step, if it holds the same; say whether it does."""
        if self._base is None or self._base.manifest.files.get(name) != entry:
            return False
        with contextlib.suppress(OSError):  # too many links, another file system, or the base was removed
            os.link(self._base.root / name, self._root / name)
            return True
        return False

    def _piece_path(self, plan: FilePlan, number: int) -> Path:
        return self._root / PIECES / plan.path / f"{plan.file}~{number}"

    def _write_piece(self, path: Path, buffer: Tensor) -> None:
        path.write_bytes(buffer.numpy().data)  # needs to outlive nothing, so not synced

    def _join_pieces(self, plan: FilePlan, buffer: Tensor) -> None:
        grid, holding = self._grids[plan.path], self._holdings[plan.path]
        # As numpy's own types of the same size, whose copies let other threads run.
        dtype = np.dtype({16: "c16"}.get(holding.item_bytes, f"u{holding.item_bytes}"))
        target = buffer.numpy().view(dtype).reshape(-1, grid.columns_per_file)
        if target.shape != plan.region.shape:
            buffer.zero_()
        for number, piece in enumerate(plan.pieces):
            values = np.fromfile(self._piece_path(plan, number), dtype=dtype).reshape(piece.region.shape)
            rows, columns = _inside(plan.region, piece.region)
            target[rows, columns] = values
        self._write_file(plan, buffer)

    def _record(self, name: str, entry: FileEntry, num_written: int) -> None:
        with self._lock:
            self.files[name] = entry
            self.num_written_bytes += num_written


def _inside(outer: Region, inner: Region) -> tuple[slice, slice]:
    (top, _), (left, _) = outer.rows, outer.columns
    rows, columns = inner.rows, inner.columns
    return slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)

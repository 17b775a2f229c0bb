"""Saving and loading a checkpoint, beside `torch.distributed.checkpoint` and a plain file on the same disk.

All are durable: files are fsynced before the clock stops. mfdist checksums what it writes and what it reads; torch
checksums what it writes. Loads are cold: the files are put out of the page cache first. Every rank holds a row shard of
each table and loads it in place; what was loaded is compared before a time is reported.
"""

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.ranks import StoreRanks
from mfdist.checkpoint.state import CheckpointState, TableShard
from mfdist.spec import Region
from mfdist.testing.run_ranks import RankPool

NUM_ROWS, ROW_DIM = 16384, 1024  # 64 tables of 8 bits: one projection of the tiny preset, wider
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one contender did in all rounds."""

    contender: str  # "mfdist", "torch" or "file"
    act: str  # "save" or "load"
    num_ranks: int
    seconds: list[float]  # a round each
    num_bytes: int  # of all ranks together
    bytes_per_s: float  # of the median round
    share_of_file: float  # median over the rounds, each against the plain file of the same round


def measure(folder: Path, *, num_bytes: int, num_ranks: Sequence[int], rounds: int) -> Iterator[Outcome]:
    """Yield every contender's outcome, after checking that each loads what it saved.

    Args:
        folder: on the disk to measure; a folder is made in it and removed.
        num_bytes: of all tables and states together, rounded up to whole tables.
        num_ranks: how many processes save together.
        rounds: contenders take turns, in another order each round, because disks are shared and uneven.
    """
    scratch = scratch_folder(folder)
    with RankPool() as pool:
        for world_size in num_ranks:
            scratch.mkdir(parents=True)
            try:
                timed = pool.run(_contest, world_size, scratch, num_bytes, rounds, timeout_s=3600.0)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            slowest = {
                key: [max(times) for times in zip(*(rank[key] for rank in timed), strict=True)] for key in timed[0]
            }
            yield from _outcomes(slowest, world_size)


def scratch_folder(folder: Path) -> Path:
    """Return the folder that this process's measurements make and remove."""
    return folder / f".mfdist-bench-{os.getpid()}"


def _outcomes(seconds: dict[tuple[str, str], list[float]], num_ranks: int) -> Iterator[Outcome]:
    for (contender, act), times in seconds.items():
        if contender == "bytes":
            continue
        num_bytes = int(seconds["bytes", ""][0])
        shares = [plain / own for plain, own in zip(seconds["file", act], times, strict=True)]
        yield Outcome(
            contender=contender,
            act=act,
            num_ranks=num_ranks,
            seconds=times,
            num_bytes=num_bytes,
            bytes_per_s=num_bytes / statistics.median(times),
            share_of_file=statistics.median(shares),
        )


def _contest(rank: int, folder: Path, num_bytes: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each contender's rounds on this rank, and the bytes of all ranks under ("bytes", "")."""
    data = _Data(rank, dist.get_world_size(), num_bytes)
    contenders: list[_Contender] = [_Mfdist(data, folder), _Torch(data, folder), _PlainFile(data, folder)]
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):  # the first is not counted: it touches memory and imports for the first time
        random.Random(number).shuffle(contenders)
        for contender in contenders:
            for act, call in (("save", contender.save), ("load", contender.load)):
                if act == "load":
                    data.forget()
                    _put_out_of_cache(folder)
                seconds = _timed(call)
                if number:
                    found.setdefault((contender.name, act), []).append(seconds)
            data.check()
            _remove(rank, folder)
    found["bytes", ""] = [float(data.num_bytes)]
    return dict(sorted(found.items()))


def _timed(call: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def _put_out_of_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # what is not on disk cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _remove(rank: int, folder: Path) -> None:
    dist.barrier()
    if rank == 0:
        for path in folder.iterdir():
            shutil.rmtree(path)
        os.sync()  # the next contender does not pay for our deletions
    dist.barrier()


class _Data:
    """A rank's shards: rows of tables with two states a weight, as Adam keeps."""

    def __init__(self, rank: int, world_size: int, num_bytes: int) -> None:
        self.num_tables = -(-num_bytes // (NUM_ROWS * ROW_DIM * 4 * (1 + len(STATES))))
        self.world_size = world_size
        self.rows = (NUM_ROWS * rank // world_size, NUM_ROWS * (rank + 1) // world_size)
        names = [f"{table}/{state}" for table in range(self.num_tables) for state in ("weight", *STATES)]
        shape, generator = (self.rows[1] - self.rows[0], ROW_DIM), torch.Generator().manual_seed(rank)
        self.saved = {name: torch.randn(shape, generator=generator) for name in names}
        self.arrays = {name: values.clone() for name, values in self.saved.items()}
        self.num_bytes = len(names) * NUM_ROWS * ROW_DIM * 4

    def forget(self) -> None:
        for values in self.arrays.values():
            values.fill_(float("nan"))

    def check(self) -> None:
        for name, values in self.arrays.items():
            assert values.equal(self.saved[name]), f"{name} did not come back"


class _Contender:
    name = ""

    def __init__(self, data: _Data, folder: Path) -> None:
        self.data = data
        self.folder = folder / self.name

    def save(self) -> None:
        raise NotImplementedError

    def load(self) -> None:
        raise NotImplementedError


class _Mfdist(_Contender):
    name = "mfdist"

    def __init__(self, data: _Data, folder: Path) -> None:
        super().__init__(data, folder)
        self._directory = CheckpointDirectory(self.folder, ranks=StoreRanks.of_process_group())
        region = Region(rows=data.rows, columns=(0, ROW_DIM))
        self._state = CheckpointState(
            step=1,
            tables={},
            dense={},
            attributes={},
            shards={
                str(table): [
                    TableShard(
                        num_rows=NUM_ROWS,
                        row_dim=ROW_DIM,
                        region=region,
                        weight=data.arrays[f"{table}/weight"],
                        optimizer={state: data.arrays[f"{table}/{state}"] for state in STATES},
                    )
                ]
                for table in range(data.num_tables)
            },
        )

    def save(self) -> None:
        self._directory.save(self._state)

    def load(self) -> None:
        self._directory.load_into(self._state, step=1)


class _Torch(_Contender):
    name = "torch"

    def __init__(self, data: _Data, folder: Path) -> None:
        super().__init__(data, folder)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (data.world_size,))
        self._state: dict[str, Tensor] = {
            name: DTensor.from_local(values, mesh, [Shard(0)]) for name, values in data.arrays.items()
        }

    def save(self) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._state, storage_writer=FileSystemWriter(self.folder, sync_files=True))

    def load(self) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(self._state, storage_reader=FileSystemReader(self.folder))


class _PlainFile(_Contender):
    """What `dd bs=4M conv=fsync` does: the same bytes in one file a rank, one fsync at its end."""

    name = "file"
    _BLOCK_BYTES = 4 << 20

    def save(self) -> None:
        self.folder.mkdir(exist_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for block in self._blocks():
                os.write(fd, block)
            os.fsync(fd)
        finally:
            os.close(fd)

    def load(self) -> None:
        fd = os.open(self._path, os.O_RDONLY)
        try:
            for block in self._blocks():
                os.readv(fd, [block])
        finally:
            os.close(fd)

    @property
    def _path(self) -> Path:
        return self.folder / str(self.data.rows[0])

    def _blocks(self) -> Iterator[memoryview]:
        for values in self.data.arrays.values():
            content = values.numpy().data.cast("B")
            for start in range(0, len(content), self._BLOCK_BYTES):
                yield content[start : start + self._BLOCK_BYTES]

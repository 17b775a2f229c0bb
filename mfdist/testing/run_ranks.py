"""Running a function on several ranks: real processes, real collectives, and an end to every wait.

    def add(rank, amount):  # at the top of a module, so that another process can import it
        total = torch.tensor(float(rank + amount))
        torch.distributed.all_reduce(total)
        return total.item()

    assert run_ranks(add, 3, 10) == [33.0, 33.0, 33.0]

A `RankPool` keeps its processes from one call to the next, which saves the seconds each takes to import torch; every
call still has a process group of its own.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

#: One thread a rank, whichever library computes, and no look at a network card.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_GRACE_S = 5.0


class RankFailedError(AssertionError):
    """A rank raised, died or was late; the message has its traceback, `__cause__` its exception where that pickles."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, backend: str = "gloo"
) -> list[Any]:
    """Return `function(rank, *args)` of every rank, each in a new process with torch.distributed set up.

    Args:
        function: importable by name; it, its arguments and its results are pickled.
        world_size: how many ranks.
        args: the same for all.
        timeout_s: for all of it, the start of the processes included; also the process group's own deadline.
        backend: for `init_process_group`; with NCCL, rank r uses GPU r.

    Raises:
        RankFailedError: of the first rank that failed, or naming those that were not done in time.

    No process is left, whatever happens, this one's death included.
    """
    with RankPool() as pool:
        return pool.run(function, world_size, *args, timeout_s=timeout_s, backend=backend)


class RankPool:
    """Processes that take a rank's part again and again; a failure ends them all, and the next call starts new ones."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mfdist-ranks-")
        self._workers: list[_Worker] = []
        self._calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and wait for their end; the pool may not be used any more."""
        self._end_workers()
        self._folder.cleanup()

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        backend: str = "gloo",
    ) -> list[Any]:
        """Return `function(rank, *args)` of every rank; see `run_ranks`."""
        deadline = time.monotonic() + timeout_s
        self._calls += 1
        while len(self._workers) < world_size:
            self._workers.append(_Worker.start(Path(self._folder.name, f"stack-{len(self._workers)}")))
        rendezvous = Path(self._folder.name, f"rendezvous-{self._calls}").as_uri()
        setup = (world_size, rendezvous, backend, timeout_s)
        try:
            for rank, worker in enumerate(self._workers[:world_size]):
                with contextlib.suppress(BrokenPipeError):  # it died; reading from it will say so
                    worker.connection.send_bytes(pickle.dumps((function, rank, args, setup)))
            return self._collect(world_size, deadline, timeout_s)
        except BaseException:
            self._end_workers()
            raise

    def _collect(self, world_size: int, deadline: float, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        pending = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailedError(self._describe_late(sorted(pending.values()), timeout_s))
            answers = {pending[connection]: self._receive(pending[connection]) for connection in ready}  # type: ignore[index]
            failures = [(answer.at_s, rank) for rank, answer in answers.items() if answer.failure is not None]
            if failures:
                _, rank = min(failures)
                failure = answers[rank].failure
                assert failure is not None
                raise RankFailedError(f"rank {rank} of {world_size} failed first: {failure[0]}") from _unpickled(
                    failure[1]
                )
            results |= {rank: answer.result for rank, answer in answers.items()}
            pending = {connection: rank for connection, rank in pending.items() if rank not in answers}
        return [results[rank] for rank in range(world_size)]

    def _receive(self, rank: int) -> "_Answer":
        worker = self._workers[rank]
        try:
            answer = pickle.loads(worker.connection.recv_bytes())
            assert isinstance(answer, _Answer)
            return answer
        except (EOFError, ConnectionResetError):
            worker.process.join(_GRACE_S)
            # What its death broke in others came later.
            return _Answer(at_s=0.0, failure=(f"it died with exit code {worker.process.exitcode}", None))

    def _describe_late(self, late: list[int], timeout_s: float) -> str:
        until = time.monotonic() + _GRACE_S
        paths: dict[int, Path] = {}
        for rank in late:
            process, path = self._workers[rank].process, self._workers[rank].stack_path
            if process.pid is not None and path.exists():
                os.kill(process.pid, signal.SIGUSR1)
                paths[rank] = path
        told = {rank: _settled(path, until) for rank, path in paths.items()}
        stacks = [f"rank {rank}:\n{told.get(rank, '(still starting)')}" for rank in late]
        return f"all ranks must be done within {timeout_s} s; late: {late}\n" + "\n".join(stacks)

    def _end_workers(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.process.close()


def _settled(path: Path, until: float) -> str:
    """Return what another process writes, once there is some of it and no more comes, or the time is over."""
    before, text = "", path.read_text()
    while (not text or text != before) and time.monotonic() < until:
        time.sleep(0.1)
        before, text = text, path.read_text()
    return text


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    stack_path: Path  # where its threads' stacks are written on SIGUSR1; made once it listens

    @classmethod
    def start(cls, stack_path: Path) -> Self:
        stack_path.unlink(missing_ok=True)  # of the one before
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, str(stack_path)), daemon=True)
        process.start()
        theirs.close()
        return cls(process=process, connection=connection, stack_path=stack_path)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a rank's call came to, and when, on the clock all processes of a machine share."""

    at_s: float
    result: Any = None
    failure: tuple[str, bytes | None] | None = None  # traceback, pickled exception


def _serve(connection: Connection, stack_path: str) -> None:
    """Take calls until the pool is gone; torch is imported by the first, after the environment is set."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(_ENVIRONMENT)
    with open(f"{stack_path}.new", "w") as stacks:  # noqa: PTH123 - a file that stays open
        faulthandler.register(signal.SIGUSR1, file=stacks)
        Path(stacks.name).rename(stack_path)  # from now on it can be asked
        while True:
            try:
                function, rank, args, setup = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            except BaseException as error:  # noqa: BLE001 - what cannot be imported is a failure to report
                connection.send_bytes(pickle.dumps(_failed(error)))
                continue
            answer = _call(function, rank, args, setup)
            connection.send_bytes(pickle.dumps(answer))
            if answer.failure is None:
                _leave(rank, setup[0], setup[3])


def _end_with_parent() -> None:
    """End this process in the middle of a call if the pool's was killed, which could not end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(
    function: Callable[..., Any], rank: int, args: tuple[Any, ...], setup: tuple[int, str, str, float]
) -> _Answer:
    import torch
    import torch.distributed as dist

    world_size, rendezvous, backend, timeout_s = setup
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        torch.manual_seed(0)
        dist.init_process_group(
            backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        result = function(rank, *args)
        pickle.dumps(result)
        return _Answer(at_s=time.monotonic(), result=result)
    except BaseException as error:  # noqa: BLE001 - whatever a rank raises is told to the test
        return _failed(error)


def _leave(rank: int, world_size: int, timeout_s: float) -> None:
    """End the process group once all ranks are done, lest one closes connections that another still uses.

    A rank that fails never comes here; the pool, told of its failure, ends those that wait.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    store.set(f"mfdist/done/{rank}", "")
    deadline = time.monotonic() + timeout_s
    while not store.check([f"mfdist/done/{each}" for each in range(world_size)]) and time.monotonic() < deadline:
        time.sleep(0.005)
    with contextlib.suppress(RuntimeError):  # a group that met its deadline is broken
        dist.destroy_process_group()


def _failed(error: BaseException) -> _Answer:
    return _Answer(at_s=time.monotonic(), failure=(traceback.format_exc(), _pickled(error)))


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:  # noqa: BLE001 - an exception may hold anything
        return None


def _unpickled(cause: bytes | None) -> BaseException | None:
    try:
        error = None if cause is None else pickle.loads(cause)
    except Exception:  # noqa: BLE001 - or refuse to be made again
        return None
    return error if isinstance(error, BaseException) else None

"""The kernels that a server's shards need, loaded before they are called, or compiled where this machine never has.

A small lookup is made on the event loop, which would stand still for as long as a compiler takes: seconds, a minute on
a busy machine. Loading what was compiled takes most of a second, nearly all of it to import the compiler.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from mfdist.checkpoint.state import TableState
from mfdist.optim import RowOptimizer
from mfdist.spec import TableSpec
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.shard import Contribution, Lookups, Shard

#: From here on rows may be looked up by a kernel for tables that are larger than a cache; and a table that surely is.
_MAYBE_LARGE_BYTES, _LARGE_BYTES = 4 << 20, 16 << 20
_ROW_DIM, _STRIDE = 64, 16
#: Tokens and lookups that are worth several threads; tokens that are updated lookup by lookup, and row by row.
_MANY, _FEW = 128, 2

_logger = logging.getLogger(__name__)


class WarmUp:
    """Calls kernels once for each kind of shard, in a thread of its own; lookups come before updates."""

    def __init__(self) -> None:
        self._ready: dict[Any, Future[None]] = {}  # by kind
        self._jobs: queue.PriorityQueue[tuple[int, int, Future[None], Callable[[], None]]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._thread: threading.Thread | None = None
        self._has_told = self._is_closing = False

    def begin(self, shard: Shard) -> "Future[None]":
        """Begin with a shard's kernels unless that was done; return what is done once those of its lookups are there.

        Called on: one thread at a time.
        """
        dtype, optimizer = shard.rows.dtype, shard.spec.optimizer
        is_large = shard.rows.nbytes > _MAYBE_LARGE_BYTES
        states = () if optimizer is None else tuple(state.dtype for state in optimizer.states.values())
        ready = self._once(0, ("lookup", dtype, is_large), lambda: _look_up(dtype, is_large=is_large))
        self._once(1, ("update", dtype, type(optimizer), states), lambda: _update(dtype, optimizer))
        return ready

    def close(self) -> None:
        """End the thread, once the part of a kernel that it compiles is done: no process can end in its middle."""
        self._is_closing = True
        self._jobs.put((-1, next(self._number), Future(), lambda: None))
        if self._thread is not None:
            self._thread.join()

    def _once(self, priority: int, kind: Any, job: Callable[[], None]) -> "Future[None]":
        if kind not in self._ready:
            done = self._ready[kind] = Future[None]()
            done.set_running_or_notify_cancel()  # whoever waits for it may be cancelled
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mfdist-warm-up", daemon=True)
                self._thread.start()
            self._jobs.put((priority, next(self._number), done, job))
        return self._ready[kind]

    def _run(self) -> None:
        from mfdist.kernels.cpu_threads import on_compiling  # brings a compiler with it

        with on_compiling(self._tell):
            while not self._is_closing:
                *_, done, job = self._jobs.get()
                try:
                    job()
                except Exception:  # calls meet it again, and say it to whoever asked
                    if not self._is_closing:
                        _logger.exception("kernels could not be tried")
                done.set_result(None)

    def _tell(self) -> None:
        if self._is_closing and threading.current_thread() is self._thread:
            raise InterruptedError("the server is ending")
        if not self._has_told:
            self._has_told = True
            _logger.info("compiling kernels, once on this machine: until they are there, calls that need them wait")


def _look_up(dtype: torch.dtype, *, is_large: bool) -> None:
    _shard(_MANY, dtype).lookup(_lookups(1, _MANY))
    _shard(_MANY, dtype).lookup(_lookups(_MANY, _MANY))
    if is_large:
        num_lookups = _LARGE_BYTES // (_STRIDE * _ROW_DIM * dtype.itemsize)
        _shard(num_lookups, dtype).lookup(_lookups(_MANY, num_lookups))


def _update(dtype: torch.dtype, optimizer: RowOptimizer | None) -> None:
    shard = _shard(_FEW, dtype, optimizer)
    for num_tokens in (_MANY, _FEW):
        contribution = Contribution(_lookups(num_tokens, _FEW), torch.ones(num_tokens, _ROW_DIM))
        if optimizer is None:
            shard.score_gradients(contribution)
        else:
            shard.update([contribution], optimizer.lr)


def _shard(num_lookups: int, dtype: torch.dtype, optimizer: RowOptimizer | None = None) -> Shard:
    spec = TableSpec(name="warm-up", num_rows=num_lookups * _STRIDE, row_dim=_ROW_DIM, dtype=dtype)
    rows = TableState(weight=torch.zeros(spec.num_rows, spec.row_dim, dtype=dtype))
    return Shard(ShardSpec(table=spec, region=spec.region, optimizer=optimizer, std=1.0, seed=0), rows)


def _lookups(num_tokens: int, num_lookups: int) -> Lookups:
    codes = torch.zeros(num_tokens, num_lookups, dtype=torch.uint8)
    return Lookups(codes, torch.ones(num_tokens, num_lookups), code_stride=_STRIDE)

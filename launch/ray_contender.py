"""What one would do without table servers: a Ray actor that holds an `nn.EmbeddingBag`, called for each batch.

Ray's default gives an actor one thread (OMP_NUM_THREADS=1, unless the environment has another); told of more CPUs it
gives as many. Tensors are pickled; numpy arrays, which Ray's authors advise, are passed faster. All take part in
`mfdist.table_server.contest`.
"""

import contextlib
import signal
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mfdist.launch import cluster, machine
from mfdist.launch.local_cluster import LocalHead, end_local
from mfdist.table_server.benchmark_case import IN_FLIGHT
from mfdist.table_server.contest import Batch, Start, Started

_START_S = 120.0
_ANSWER_S = 60.0


class Bag:
    """The actor.

    Args:
        rows: [R, D].
    """

    def __init__(self, rows: Tensor) -> None:
        self._bag = nn.EmbeddingBag.from_pretrained(rows, mode="sum")

    def lookup(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return sums [N, D] for ids [N, K] and scores [N, K]."""
        with torch.no_grad():
            sums: Tensor = self._bag(ids, per_sample_weights=scores)
            return sums

    def num_threads(self) -> int:
        """Return how many threads look up."""
        return torch.get_num_threads()


class ArrayBag(Bag):
    """The same, asked and answering in numpy arrays."""

    def lookup(self, ids: Any, scores: Any) -> Any:
        """Return sums [N, D] for ids [N, K] and scores [N, K]."""
        return super().lookup(torch.tensor(ids), torch.tensor(scores)).numpy()


@contextlib.contextmanager
def ray_contenders() -> Iterator[dict[str, Start]]:
    """Give contenders that run in a Ray of this machine, which is there as long as the body runs.

    Raises:
        ConfigError: Ray is not installed.
        UnavailableError: it did not start.
    """
    cpus = int(machine.cpu()["usable_cores"] or 1)
    head = LocalHead(cpus)
    address = None
    before = signal.getsignal(signal.SIGTERM)
    try:
        address = head.ready()
        with cluster.joined_cluster(address):
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there
            yield {
                "Ray actor": lambda batch: _started(batch, Bag, {}),
                f"Ray actor, num_cpus={cpus}": lambda batch: _started(batch, Bag, {"num_cpus": cpus}),
                "Ray actor, numpy": lambda batch: _started(batch, ArrayBag, {}),
            }
    finally:
        if address is not None:
            end_local(address)
        head.abandon()


@contextlib.contextmanager
def _started(batch: Batch, kind: type[Bag], options: dict[str, Any]) -> Iterator[Started]:
    import ray

    actor = ray.remote(**options)(kind) if options else ray.remote(kind)
    handle = actor.remote(batch.rows)
    try:
        num_threads = cluster.answer(handle.num_threads.remote(), _START_S)
        given, sums = (batch.ids, batch.scores), batch.sums
        if kind is ArrayBag:
            yield _Actor(handle, num_threads, tuple(each.numpy() for each in given), sums.numpy())
        else:
            yield _Actor(handle, num_threads, given, sums)
    finally:
        cluster.end_actor(handle)


class _Actor:
    """The actor as this process calls it: with what is given, for what is like `expected`."""

    def __init__(self, handle: Any, num_threads: int, given: tuple[Any, ...], expected: Any) -> None:
        self._handle, self.num_threads, self._given, self._expected = handle, num_threads, given, expected

    def sums(self) -> Tensor:
        return self._answer(self._call())

    def num_bytes(self) -> tuple[int, int]:
        from ray import cloudpickle

        return sum(len(cloudpickle.dumps(each)) for each in self._given), len(cloudpickle.dumps(self._expected))

    def load(self, seconds: float) -> float:
        began, count = time.perf_counter(), 0
        under_way = deque(self._call() for _ in range(IN_FLIGHT))
        while under_way:
            self._answer(under_way.popleft())
            count += 1
            if time.perf_counter() < began + seconds:
                under_way.append(self._call())
        return count / (time.perf_counter() - began)

    def _call(self) -> Any:
        return self._handle.lookup.remote(*self._given)

    def _answer(self, call: Any) -> Tensor:
        found = cluster.answer(call, _ANSWER_S)
        return found if isinstance(found, Tensor) else torch.tensor(found)

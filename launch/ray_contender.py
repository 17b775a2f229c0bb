"""What one would do without table servers: a Ray actor that holds an `nn.EmbeddingBag`, called for each batch.

Ray's default gives an actor one thread (OMP_NUM_THREADS=1, unless the environment has another); told of more CPUs it
gives as many. Both take part in `mfdist.table_server.contest`.
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
                "Ray actor": lambda batch: _started(batch, {}),
                f"Ray actor, num_cpus={cpus}": lambda batch: _started(batch, {"num_cpus": cpus}),
            }
    finally:
        if address is not None:
            end_local(address)
        head.abandon()


@contextlib.contextmanager
def _started(batch: Batch, options: dict[str, Any]) -> Iterator[Started]:
    import ray

    kind = ray.remote(**options)(Bag) if options else ray.remote(Bag)
    handle = kind.remote(batch.rows)
    try:
        yield _Actor(batch, handle, cluster.answer(handle.num_threads.remote(), _START_S))
    finally:
        cluster.end_actor(handle)


class _Actor:
    """The actor as this process calls it."""

    def __init__(self, batch: Batch, handle: Any, num_threads: int) -> None:
        self._batch, self._handle, self.num_threads = batch, handle, num_threads

    def sums(self) -> Tensor:
        found: Tensor = cluster.answer(self._call(), _ANSWER_S)
        return found

    def num_bytes(self) -> tuple[int, int]:
        from ray import cloudpickle

        batch = self._batch
        return len(cloudpickle.dumps(batch.ids)) + len(cloudpickle.dumps(batch.scores)), len(
            cloudpickle.dumps(batch.sums)
        )

    def load(self, seconds: float) -> float:
        began, count = time.perf_counter(), 0
        under_way = deque(self._call() for _ in range(IN_FLIGHT))
        while under_way:
            cluster.answer(under_way.popleft(), _ANSWER_S)
            count += 1
            if time.perf_counter() < began + seconds:
                under_way.append(self._call())
        return count / (time.perf_counter() - began)

    def _call(self) -> Any:
        return self._handle.lookup.remote(self._batch.ids, self._batch.scores)

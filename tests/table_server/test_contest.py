"""Contenders are compared with the local lookup before they are timed, and each is started in every turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mfdist.errors import ConsistencyError
from mfdist.table_server.contest import Batch, Started, measure_contest


@dataclass
class Halfway:
    """A contender that is not one: the sums of this process, or others, at a hundred requests a second."""

    batch: Batch
    off_by: float
    num_threads: int = 3
    loads: list[float] = field(default_factory=list)

    def sums(self) -> Tensor:
        rows = self.batch.rows.double()[self.batch.ids]
        return (self.batch.scores.double().unsqueeze(-1) * rows).sum(1).float() * (1 + self.off_by)

    def num_bytes(self) -> tuple[int, int]:
        return 1000, 2000

    def load(self, seconds: float) -> float:
        self.loads.append(seconds)
        return 100.0


def test_every_contender_is_started_in_every_turn() -> None:
    begun: list[Halfway] = []

    @contextmanager
    def start(batch: Batch) -> Iterator[Started]:
        begun.append(Halfway(batch, off_by=0.0))
        yield begun[-1]

    server, other = measure_contest({"other": start}, starts=2, seconds=0.2)
    assert [one.loads for one in begun] == [[0.05, 0.2]] * 2
    assert (server.contender, other.contender) == ("table server", "other")
    assert server.num_threads > 0
    assert server.times_as_fast == [1.0, 1.0]
    assert server.bytes_ratio == 1.0
    assert server.request_bytes > 64 * 64 * 5  # a code and a score each
    assert server.reply_bytes > 64 * 512 * 4
    assert other.requests_per_s == [100.0, 100.0]
    assert other.median_per_s == 100.0
    assert other.times_as_fast == [rate / 100 for rate in server.requests_per_s]
    assert other.bytes_ratio == 3000 / (server.request_bytes + server.reply_bytes)


@pytest.mark.parametrize("off_by", [1e-4, float("nan")])
def test_a_contender_that_is_wrong_is_not_timed(off_by: float) -> None:
    begun: list[Halfway] = []

    @contextmanager
    def start(batch: Batch) -> Iterator[Started]:
        begun.append(Halfway(batch, off_by))
        yield begun[-1]

    with pytest.raises(ConsistencyError, match="sums of a wrong one must be the local lookup's"):
        measure_contest({"wrong one": start}, starts=1, seconds=0.1)
    assert [one.loads for one in begun] == [[]]


def test_the_batch_is_the_same_rows_by_codes_and_by_ids() -> None:
    batch = Batch.of_64_tokens()
    slots = torch.arange(batch.ids.shape[1])
    assert batch.ids.dtype == torch.int64
    assert torch.equal(batch.ids // batch.stride, slots.expand_as(batch.ids))
    assert torch.equal(batch.ids % batch.stride, batch.codes.long())

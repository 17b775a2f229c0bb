"""Sharded tables timed: every kind of sharding on real ranks, beside TorchRec where it is installed.

Each contender's sums, before and after an update, are compared with an unsharded table's before it is timed.
Contenders take turns, so that a slow moment falls on all of them, and of the turns the median counts; of the ranks the
slowest. What the exchange reaches is measured by making the same sends once more without the lookups, beside one plain
all-to-all of as many bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from mfdist.benchmarks.sharding_case import ShardingCase
from mfdist.benchmarks.sharding_ranks import WRONG, Contest, Measured, contest
from mfdist.errors import ConfigError
from mfdist.testing.run_ranks import RankPool

#: What is compared where nobody says.
CONTENDERS = ("column_wise", "table_wise", "row_wise", "row_wise-each-time", "row_wise-pooled", "grid", "replicated")
TORCHREC = ("torchrec-column_wise", "torchrec-table_wise", "torchrec-row_wise")
NCCL = ("column_wise-nccl", "table_wise-nccl")
#: Properties of a `ShardingResult` that are written beside its fields.
DERIVED = ("tokens_per_s", "share_of_plain", "share_if_idle")
_DEADLINE_S = 1200.0


def _codes(
    name: str, num_tokens: int, num_lookups: int, stride: int, row_dim: int, dtype: torch.dtype = torch.float32
) -> ShardingCase:
    return ShardingCase(
        name=name,
        num_tokens=num_tokens,
        num_lookups=num_lookups,
        code_stride=stride,
        num_rows=num_lookups * stride,
        row_dim=row_dim,
        dtype=dtype,
    )


#: Device → the cases: MemoryFormer's projections, in bf16 as they are trained over GPUs too, and one large table by row
#: ids, even and as words are distributed.
CASES = {
    "cpu": (
        _codes("tiny-qkv", 2048, 64, 256, 512),
        _codes("base-ffn2", 1024, 128, 1024, 1024),
        ShardingCase(name="ids", num_tokens=2048, num_lookups=16, num_rows=200_000, row_dim=256),
        ShardingCase(name="ids-zipf", num_tokens=2048, num_lookups=16, num_rows=200_000, row_dim=256, zipf=1.1),
    ),
    "cuda": (
        _codes("base-qkv", 16384, 128, 256, 3072),
        _codes("base-ffn2", 16384, 128, 1024, 1024),
        _codes("base-qkv-bf16", 16384, 128, 256, 3072, torch.bfloat16),
        _codes("base-ffn2-bf16", 16384, 128, 1024, 1024, torch.bfloat16),
        ShardingCase(name="ids", num_tokens=16384, num_lookups=32, num_rows=4_000_000, row_dim=256),
        ShardingCase(name="ids-zipf", num_tokens=16384, num_lookups=32, num_rows=4_000_000, row_dim=256, zipf=1.1),
    ),
}


@dataclass(frozen=True, kw_only=True)
class ShardingResult:
    """What was found of one contender in one case; times are None where it was not timed, and `note` says why.

    Args:
        case, contender: names.
        world_size, tokens_a_rank: how much there was to do.
        forward_s: of the slowest rank, the median of its turns.
        step_s: likewise, of forward, backward and update; begun and waited for together, the host's time included.
        in_a_row_s: seconds a step where steps follow each other without a wait, as the layers of a model do.
        num_turns: how often it was timed.
        sent_bytes: by the rank that sends most, forward and backward.
        exchange_s: the same sends without the lookups, queued behind other work.
        plain_s: one all-to-all of as many bytes, queued likewise.
        started_s, plain_started_s: the same two, begun while the device is idle.
        overlap: on a GPU, the share of the time of messages, waits for them included, during which kernels computed.
        peak_bytes: on a GPU, the most memory held during a step, by all contenders of the case together.
        error: the largest distance from an unsharded table's sums; None where that is too large to be made.
        is_wrong: whether it was further off than it may be.
    """

    case: str
    world_size: int
    contender: str
    tokens_a_rank: int
    forward_s: float | None = None
    step_s: float | None = None
    in_a_row_s: float | None = None
    num_turns: int = 0
    sent_bytes: int | None = None
    exchange_s: float | None = None
    plain_s: float | None = None
    started_s: float | None = None
    plain_started_s: float | None = None
    overlap: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    is_wrong: bool = False
    note: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Return the tokens of all ranks trained a second, in steps that follow each other."""
        return None if self.in_a_row_s is None else self.tokens_a_rank * self.world_size / self.in_a_row_s

    @property
    def share_of_plain(self) -> float | None:
        """Return the bandwidth of the exchange as a share of the plain all-to-all's, both queued."""
        return None if not self.exchange_s or self.plain_s is None else self.plain_s / self.exchange_s

    @property
    def share_if_idle(self) -> float | None:
        """Return the same of both begun while the device is idle."""
        return None if not self.started_s or self.plain_started_s is None else self.plain_started_s / self.started_s


def chosen(device: str, cases: Sequence[str], contenders: Sequence[str]) -> tuple[list[ShardingCase], list[str]]:
    """Return the cases and contenders whose names match a shell pattern; all, where there is none.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    known = {case.name: case for case in CASES[device]}
    everyone = (*CONTENDERS, *(TORCHREC if device == "cpu" else NCCL))
    return (
        [known[name] for name in _matching("case", tuple(known), cases)],
        _matching("contender", everyone, contenders),
    )


def compare(
    device: str,
    world_sizes: Sequence[int],
    cases: Sequence[ShardingCase],
    contenders: Sequence[str],
    *,
    seconds: float = 3.0,
    timeout_s: float = _DEADLINE_S,
) -> Iterator[ShardingResult]:
    """Yield what is found of each contender, world by world and case by case.

    Args:
        device: cpu or cuda, of which each rank needs one.
        world_sizes: how many ranks.
        cases, contenders: from `chosen`.
        seconds: how long each is timed in each case, three turns at least.
        timeout_s: for each case at each world size.
    """
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    with RankPool() as pool:
        for world_size in world_sizes:
            for case in cases:
                asked = Contest(case=case, device=device, contenders=tuple(contenders), seconds=seconds)
                everyones = pool.run(contest, world_size, asked, timeout_s=timeout_s, backend=backend)
                for name in contenders:
                    yield _result(case, world_size, name, [found[name] for found in everyones])


def _result(case: ShardingCase, world_size: int, contender: str, ranks: Sequence[Measured]) -> ShardingResult:
    note = next((found.note for found in ranks if found.note), "")
    alone = [found.alone for found in ranks if found.alone is not None]
    overlaps = [found.overlap for found in ranks if found.overlap is not None]
    return ShardingResult(
        case=case.name,
        world_size=world_size,
        contender=contender,
        tokens_a_rank=case.num_tokens,
        forward_s=None if note else max(found.forward_s for found in ranks),
        step_s=None if note else max(found.step_s for found in ranks),
        in_a_row_s=None if note else max(found.in_a_row_s for found in ranks),
        num_turns=ranks[0].num_turns,
        sent_bytes=max((one.sent_bytes for one in alone), default=None),
        exchange_s=max((one.exchange_s for one in alone), default=None),
        plain_s=max((one.plain_s for one in alone), default=None),
        started_s=max((one.started_s for one in alone), default=None),
        plain_started_s=max((one.plain_started_s for one in alone), default=None),
        overlap=min(overlaps, default=None),
        peak_bytes=max((found.peak_bytes for found in ranks if found.peak_bytes is not None), default=None),
        error=max((found.error for found in ranks if found.error is not None), default=None),
        is_wrong=note == WRONG,
        note=note,
    )


def _matching(what: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    found = [name for name in names if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    unmatched = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)]
    if unmatched:
        raise ConfigError(f"a {what} must be one of {', '.join(names)}; got {unmatched[0]}")
    return found

"""Workloads: what is asked of the tables in a step. Pure values.

Shape letters: N tokens, K lookups a token, R rows, S rows of a slot, U unique rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mfdist.errors import ConfigError

Rule = Literal["sgd", "rowwise_adagrad", "adam"]
RULES: tuple[Rule, ...] = get_args(Rule)


#: Lookups of a row, on average, from which nearly all rows are read: listing them would cost more than it saves.
_DENSE_READS = 4


def reads_most_rows(num_lookups: float, num_rows: int) -> bool:
    """Return whether so many lookups read so large a share of the rows that their gradients are better not listed."""
    return num_lookups >= _DENSE_READS * num_rows > 0


@dataclass(frozen=True, kw_only=True)
class TableLoad:
    """How a table is read.

    Args:
        num_lookups: K, rows read a token.
        code_stride: S, rows a slot owns; 0 where lookups are by row id and there are no slots.
        id_bytes: of a code or row id, as it comes from the addressing.
        duplicate_share: share of a rank's lookups that ask for a row it has asked for already in the same micro-batch.
            None: what ids drawn evenly from the table, or from each slot, would give.
    """

    num_lookups: int
    code_stride: int = 0
    id_bytes: int = 8
    duplicate_share: float | None = None

    def __post_init__(self) -> None:
        if self.num_lookups < 1 or self.code_stride < 0 or self.id_bytes < 1:
            raise ConfigError(f"a table is read at least once a token, by ids of at least a byte; got {self}")
        if self.duplicate_share is not None and not 0 <= self.duplicate_share < 1:
            raise ConfigError(f"a duplicate share lies in [0, 1); got {self.duplicate_share}")

    def num_unique(self, num_rows: int, num_tokens: float) -> float:
        """Return U, the different rows that `num_tokens` tokens ask a table of `num_rows` for."""
        lookups = num_tokens * self.num_lookups
        if self.duplicate_share is not None:
            return min(lookups * (1 - self.duplicate_share), num_rows)
        slot_rows, draws = (self.code_stride, num_tokens) if self.code_stride else (num_rows, lookups)
        if slot_rows == 1:
            return min(lookups, num_rows)
        return -num_rows * math.expm1(draws * math.log1p(-1 / slot_rows))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training step, as far as plans depend on it.

    Args:
        batch_tokens: tokens a step over all ranks.
        loads: table name → how it is read.
        micro_batches: parts a rank's share is split into; each is looked up and exchanged by itself.
        rule: what updates rows. `rowwise_adagrad` keeps one fp32 number a row, `adam` two numbers a weight.
        state_dtype: of Adam's states; uint8 is a byte each.
        is_fused: rows are updated in backward from the gradients of touched rows; otherwise every weight has a gradient
            and is updated.
        lookup_dtype: what rows are read as where that is narrower than what they are kept in, as under autocast; then a
            copy of them lives from the lookup to its backward, except where they are fused: those are read as they
            are, and their sums rounded.
        deduplicate: send each row id once.
        forward_dtype, backward_dtype: of the traffic; None takes each table's.
        num_dense_parameters: parameters beside the tables, in fp32 with a gradient and Adam, on every rank.
        dense_flops_per_token: forward and backward.
        activation_bytes_per_token: what is kept for backward beside lookups.

    Raises:
        ConfigError: a count is out of range, or the rule is unknown.
    """

    batch_tokens: int
    loads: Mapping[str, TableLoad]
    micro_batches: int = 1
    rule: Rule = "adam"
    state_dtype: torch.dtype = torch.float32
    is_fused: bool = False
    lookup_dtype: torch.dtype | None = None
    deduplicate: bool = True
    forward_dtype: torch.dtype | None = None
    backward_dtype: torch.dtype | None = None
    num_dense_parameters: int = 0
    dense_flops_per_token: float = 0.0
    activation_bytes_per_token: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_tokens < 1 or self.micro_batches < 1:
            raise ConfigError(
                f"a step has at least one token in one micro-batch; got batch_tokens={self.batch_tokens}, "
                f"micro_batches={self.micro_batches}"
            )
        if self.rule not in RULES:
            raise ConfigError(f'the rule must be one of {", ".join(RULES)}; got "{self.rule}"')
        if self.is_fused and self.micro_batches > 1:
            raise ConfigError(
                "fused rows are updated by each backward, so a step is one micro-batch; "
                f"got micro_batches={self.micro_batches}"
            )

    def load(self, name: str) -> TableLoad:
        """Return how the table `name` is read.

        Raises:
            ConfigError: the workload does not say.
        """
        if name not in self.loads:
            raise ConfigError(f'a workload must say how each table is read; it lacks "{name}"')
        return self.loads[name]

    def read_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return what rows kept in `dtype` are read and travel as."""
        return dtype if self.is_fused else self.summed_dtype(dtype)

    def summed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return what sums of rows kept in `dtype` are rounded to in the end."""
        narrow = self.lookup_dtype
        return dtype if narrow is None or narrow.itemsize >= dtype.itemsize else narrow

    def tokens_per_exchange(self, world_size: int) -> int:
        """Return the tokens a rank looks up at once: its share of a micro-batch, rounded up."""
        return math.ceil(self.batch_tokens / (world_size * self.micro_batches))

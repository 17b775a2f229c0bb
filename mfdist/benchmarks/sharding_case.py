"""One table and what the ranks ask of it, in the benchmark of sharded tables; what must come of it, by plain torch.

Letters: n tokens a rank, N of all ranks, K lookups a token, R rows, D row width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfdist.spec import Region, TableSpec
from mfdist.tables.initial_rows import draw_rows

#: Of the plain SGD that trains the rows: so large that a missing update shows in the sums.
RATE = 0.05
STD, SEED = 0.02, 11
#: Tables up to this size are made whole on every rank, to check sums against.
_CHECKED_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class ShardingCase:
    """One table and what a rank asks of it.

    Args:
        name: of the case.
        num_tokens: n.
        num_lookups: K.
        code_stride: rows a slot, or 0 where ids lie anywhere in `num_rows`.
        num_rows, row_dim: of the table.
        zipf: exponent of the ids' frequencies, or 0 for even ones.
        dtype: of the rows, the sums and their gradients.
    """

    name: str
    num_tokens: int
    num_lookups: int
    code_stride: int = 0
    num_rows: int
    row_dim: int
    zipf: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> TableSpec:
        """Return the table's."""
        return TableSpec(name=self.name, num_rows=self.num_rows, row_dim=self.row_dim, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's tokens."""

    row_ids: Tensor  # [n, K] codes of one or four bytes, or int64 row ids
    scores: Tensor  # [n, K] fp32
    grad_output: Tensor  # [n, D]
    code_stride: int


def make_batch(case: ShardingCase, rank: int, device: torch.device) -> Batch:
    """Return a rank's tokens, the same on every rank that asks for them."""
    generator = torch.Generator().manual_seed(1000 + rank)
    shape, limit = (case.num_tokens, case.num_lookups), case.code_stride or case.num_rows
    if case.zipf:
        # The inverse of a continuous Zipf distribution's integral needs no table of all ranks.
        even, power = torch.rand(shape, generator=generator, dtype=torch.float64), 1 - case.zipf
        ids = (((limit + 1) ** power - 1) * even + 1).pow(1 / power).long().sub_(1).clamp_(0, limit - 1)
    else:
        ids = torch.randint(0, limit, shape, generator=generator)
    if case.code_stride:
        ids = ids.to(torch.uint8) if case.code_stride <= 256 else ids.int()
    return Batch(
        row_ids=ids.to(device),
        scores=torch.rand(shape, generator=generator).to(device).requires_grad_(),
        grad_output=torch.randn(case.num_tokens, case.row_dim, generator=generator).to(device, case.dtype),
        code_stride=case.code_stride,
    )


def first_rows(
    case: ShardingCase, rows: tuple[int, int], columns: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return the values that a part of the table starts with on this kind of device."""
    region = Region(rows=rows, columns=columns)
    part = torch.empty(region.shape, device=device, dtype=case.dtype)
    draw_rows(part, case.spec, region, STD, SEED)
    return part


def expected_sums(case: ShardingCase, rank: int, world_size: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return a rank's sums [n, D] before and after one update by all ranks' tokens, or None for too large a table.

    One whole table in float64 and nothing of ours: `torch.nn.functional.embedding_bag`, and `index_add_` of the
    gradient of the mean over the ranks.
    """
    spec = case.spec
    if spec.num_bytes > _CHECKED_BYTES:
        return None
    rows = first_rows(case, spec.region.rows, spec.region.columns, device).double()
    own = make_batch(case, rank, device)
    before = _sums(rows, own)
    for each in range(world_size):
        batch = make_batch(case, each, device)
        ids, scores, grads = _row_ids(batch), batch.scores.detach().double(), batch.grad_output.double() / world_size
        for lookup in range(case.num_lookups):
            rows.index_add_(0, ids[:, lookup], scores[:, lookup, None] * grads, alpha=-RATE)
    return before, _sums(rows, own)


def _sums(rows: Tensor, batch: Batch) -> Tensor:
    scores = batch.scores.detach().double()
    return nn.functional.embedding_bag(_row_ids(batch), rows, mode="sum", per_sample_weights=scores)


def _row_ids(batch: Batch) -> Tensor:
    slots = torch.arange(batch.row_ids.shape[1], device=batch.row_ids.device)
    return batch.row_ids.long() + batch.code_stride * slots

"""Which part of a lookup each server makes, and how their answers become one. Pure tensors.

Shape letters: N tokens, K lookups a token, D row width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels.row_id_check import bad_id_error
from mfdist.sharding.table_plan import TablePlan
from mfdist.spec import Region
from mfdist.table_server.shard import Lookups


@dataclass(frozen=True)
class Part:
    """What one server does of a lookup."""

    server: int
    region: Region
    lookups: Lookups
    #: Which of the scores [N, K] these are: some slots, or a mask of single ones.
    where: slice | Tensor


def parts_of(plan: TablePlan, row_ids: Tensor, scores: Tensor, code_stride: int) -> list[Part]:
    """Return the parts of a lookup, by the servers that make them.

    Args:
        plan: of the table; owners are servers.
        row_ids: [N, K]; see `Table.forward`.
        scores: [N, K].
        code_stride: see `Table.forward`.

    Raises:
        ConfigError: shapes do not fit together.
        RowIdError: an id lies outside the table.
    """
    if row_ids.ndim != 2 or scores.shape != row_ids.shape:
        raise ConfigError(
            f"a lookup takes row_ids [N, K] and scores [N, K]; got {list(row_ids.shape)} and {list(scores.shape)} "
            f'for table "{plan.name}"'
        )
    num_tokens, num_lookups = row_ids.shape
    if code_stride < 0 or (code_stride and plan.num_rows != num_lookups * code_stride):
        raise ConfigError(
            f"with a code_stride the table must have K · code_stride rows; got {plan.num_rows} rows, K={num_lookups}, "
            f'code_stride={code_stride} for table "{plan.name}"'
        )
    _check_ids(plan, row_ids, code_stride)
    parts = []
    for shard in plan.shards:
        begin, end = shard.region.rows
        if (begin, end) == (0, plan.num_rows):
            parts.append(_slots(shard.owner, shard.region, row_ids, scores, slice(0, num_lookups), code_stride))
        elif code_stride and begin % code_stride == 0 and end % code_stride == 0:
            slots = slice(begin // code_stride, end // code_stride)
            parts.append(_slots(shard.owner, shard.region, row_ids, scores, slots, code_stride))
        else:
            ids = row_ids.long() + torch.arange(num_lookups) * code_stride
            mask = (ids >= begin) & (ids < end)
            tokens = mask.nonzero()[:, 0].int()
            lookups = Lookups(ids[mask], scores[mask], tokens, num_tokens)
            parts.append(Part(shard.owner, shard.region, lookups, mask))
    return parts


def joined_sums(parts: Sequence[Part], sums: Sequence[Tensor], row_dim: int) -> Tensor:
    """Return [N, D], columns joined and rows' parts added in fp32 in the order of the parts; in the sums' dtype."""
    if len(parts) == 1:
        return sums[0]
    by_columns: dict[tuple[int, int], list[Tensor]] = {}
    for part, answer in zip(parts, sums, strict=True):
        by_columns.setdefault(part.region.columns, []).append(answer)
    out = sums[0].new_empty(sums[0].shape[0], row_dim)
    for (begin, end), answers in by_columns.items():
        total = answers[0]
        if len(answers) > 1:
            total = answers[0].float()
            for answer in answers[1:]:
                total = total + answer.float()
        out[:, begin:end] = total
    return out


def joined_score_gradients(parts: Sequence[Part], gradients: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Return [N, K] in fp32: where several servers have columns of a row, their sum in the order of the parts."""
    out = torch.zeros(shape)
    for part, gradient in zip(parts, gradients, strict=True):
        if isinstance(part.where, slice):
            out[:, part.where] += gradient
        else:
            out[part.where] += gradient
    return out


def cut(lookups: Lookups, bounds: Iterator[slice]) -> Iterator[tuple[slice, Lookups]]:
    """Yield runs of tokens of lookups, each with its bounds."""
    for run in bounds:
        if lookups.tokens is None:
            part = Lookups(
                lookups.row_ids[run],
                lookups.scores[run],
                code_stride=lookups.code_stride,
                first_slot=lookups.first_slot,
            )
        else:
            edges = torch.tensor([run.start, run.stop], dtype=torch.int32)
            low, high = torch.searchsorted(lookups.tokens, edges).tolist()
            tokens = lookups.tokens[low:high] - run.start
            part = Lookups(lookups.row_ids[low:high], lookups.scores[low:high], tokens, run.stop - run.start)
        yield run, part


def _slots(owner: int, region: Region, row_ids: Tensor, scores: Tensor, slots: slice, code_stride: int) -> Part:
    lookups = Lookups(row_ids[:, slots], scores[:, slots], code_stride=code_stride, first_slot=slots.start)
    return Part(owner, region, lookups, slots)


def _check_ids(plan: TablePlan, row_ids: Tensor, code_stride: int) -> None:
    limit = code_stride or plan.num_rows
    if error := bad_id_error(row_ids, limit, plan.name, is_code=code_stride > 0):
        raise error

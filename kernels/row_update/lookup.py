"""A lookup whose backward updates the rows: gather_sum forward, fused_row_update backward."""

from typing import Any

import torch
from torch import Tensor

from mfdist.kernels.lookup_arguments import check_lookup
from mfdist.kernels.row_update.arguments import check_update, rule_arguments
from mfdist.kernels.row_update.op import RULE_SCHEMA, fused_row_update_unchecked
from mfdist.kernels.row_update.rule import RowRule

torch.library.define(
    "mfdist::updating_gather_sum",
    "(Tensor table, Tensor[] state, Tensor row_ids, Tensor scores, Tensor lr, Tensor step, Tensor anchor, "
    f"{RULE_SCHEMA}, int code_stride, str name) -> Tensor",
)
_updating_gather_sum = torch.ops.mfdist.updating_gather_sum.default
_NUM_TENSORS = 7


def updating_gather_sum(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    rule: RowRule,
    lr: Tensor,
    step: Tensor,
    anchor: Tensor,
    *,
    row_offset: int = 0,
    column_offset: int = 0,
    code_stride: int = 0,
    name: str = "table",
) -> Tensor:
    """Return gather_sum, whose backward adds 1 to `step` and updates the table and its state in place.

    Args:
        table: [R, D], without a gradient of its own, as torch.compile demands of what backward changes.
        state: see `fused_row_update`, and so for what is not told of here.
        row_ids: [N, K].
        scores: [N, K], in which the result is differentiable.
        rule: what is done with a row's gradient.
        lr: the learning rate, read in backward.
        step: updates made so far.
        anchor: any tensor that requires a gradient, which it never gets: it makes backward run where scores need none.
        row_offset: see `fused_row_update`.
        column_offset: see `fused_row_update`.
        code_stride: see gather_sum.
        name: what errors call the table.

    Returns:
        [N, D] in table.dtype; see gather_sum. Where the rows have changed between a lookup and its backward, as when
        two lookups of one table are in one graph, torch refuses the second backward: its score gradients would not
        be those of the rows that were read.

    Raises:
        RowIdError: an id lies outside the table; see gather_sum.
        ConfigError: shapes, dtypes or devices do not fit together.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    check_update(table, state, rule, lr, step, name)
    out: Tensor = _updating_gather_sum(
        table, state, row_ids, scores, lr, step, anchor,
        *rule_arguments(rule), row_offset, column_offset, code_stride, name,
    )  # fmt: skip
    return out


@torch.library.impl("mfdist::updating_gather_sum", "CompositeExplicitAutograd")
def _forward(table: Tensor, state: list[Tensor], row_ids: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    out: Tensor = torch.ops.mfdist.gather_sum.default(table, row_ids, scores, *rest[-2:])
    return out


@torch.library.register_fake("mfdist::updating_gather_sum")
def _shape_of(table: Tensor, state: list[Tensor], row_ids: Tensor, *rest: Any) -> Tensor:
    return table.new_empty(row_ids.shape[0], table.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, state, row_ids, scores, lr, step, _, *ctx.settings = inputs
    ctx.save_for_backward(table, row_ids, scores, *state)
    ctx.lr, ctx.step = lr, step  # read as they are when backward runs


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    table, row_ids, scores, *state = ctx.saved_tensors
    ctx.step.add_(1)
    grad_scores = fused_row_update_unchecked(
        table, state, row_ids, scores, grad_output, ctx.lr, ctx.step, *ctx.settings
    )
    return None, [None] * len(state), None, grad_scores, *[None] * (_NUM_TENSORS - 4 + len(ctx.settings))


torch.library.register_autograd("mfdist::updating_gather_sum", _backward, setup_context=_keep)

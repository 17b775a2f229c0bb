"""row_update fused with the gradient of lookups listed token by token, as the owner of a few rows gets them."""

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.ragged_gradient import ragged_gradient
from mfdist.kernels.row_update.arguments import check_update
from mfdist.kernels.row_update.op import row_update
from mfdist.kernels.row_update.rule import RowRule

#: T · K of lookups that a GPU puts in order by their numbers.
_MOST_NUMBERS = 2**32 - 1


def ragged_row_update(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    runs: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    num_lookups: int,
    rule: RowRule,
    lr: Tensor,
    step: Tensor,
    *,
    row_offset: int = 0,
    column_offset: int = 0,
    name: str = "table",
) -> Tensor:
    """Update the rows that listed lookups read by their gradients, and return the gradient of the lookups' scores.

    It runs inside backward passes and has no compiled form. M lookups in all, of T tokens.

    Args:
        table: [R, D], as for `fused_row_update`; so are all arguments not told of here.
        state: the rule's tensors.
        row_ids: [M], int32 or int64 in [0, R): the row of each lookup, those of token 0 first.
        runs: [T], int32 or int64: how many lookups each token has, M together.
        scores: [M], fp32.
        grad_output: [T, D], the gradients of the tokens' sums.
        num_lookups: K, which no token has more lookups than.
        rule: what is done with a row's gradient.
        lr: the learning rate.
        step: t, counted from 1.
        row_offset: see `fused_row_update`.
        column_offset: see `fused_row_update`.
        name: what errors call the table.

    Returns:
        [M] in the dtype of the scores, from the rows as they were. Rows are updated as `fused_row_update` does where
        all tokens have K lookups: by the same bits on the CPU, on a GPU up to rounding. The same bits each time.

    Raises:
        RowIdError: an id lies outside the table (CPU, where nothing was changed; on a GPU whoever made the list has
            checked it).
        ConfigError: shapes, dtypes or devices do not fit together. Nothing was changed.

    Cost: M·D elements of grad_output read, on a CPU twice, and of touched rows; touched rows and their states written.
    A stable sort of M ids. Beside, on a GPU T·K scores' gradients; on a CPU, or where T·K does not fit 32 bits, the
    rows' gradients.
    """
    check_update(table, state, rule, lr, step, name)
    # With more numbers than half a word has, an owner would be alone with an error.
    if not table.is_cuda or runs.numel() * num_lookups > _MOST_NUMBERS:
        tokens = torch.repeat_interleave(runs, output_size=row_ids.numel())
        wide = torch.promote_types(table.dtype, torch.float32)
        rows, grads, grad_scores = ragged_gradient(table, row_ids, tokens, scores, grad_output, name, dtype=wide)
        row_update(
            table, state, grads, rule, lr, step,
            rows=rows, row_offset=row_offset, column_offset=column_offset, name=name,
        )  # fmt: skip
        return grad_scores
    if row_ids.ndim != 1 or row_ids.shape != scores.shape or grad_output.shape != (runs.numel(), table.shape[1]):
        raise ConfigError(
            "listed lookups take row_ids and scores [M], runs [T] and grad_output [T, D]; got "
            f"{list(row_ids.shape)}, {list(scores.shape)}, {list(runs.shape)} and {list(grad_output.shape)} for table "
            f'"{name}", D={table.shape[1]}'
        )
    torch.autograd.graph.increment_version([table, *state])
    made: Tensor = implementation.on_gpu("row_update").ragged_row_update(
        table, state, row_ids, runs, scores, grad_output, num_lookups, lr, step, rule, (row_offset, column_offset)
    )
    return made

"""ragged_gradient: dispatch by device. It runs inside backward passes and has no gradient or compiled form of its own.

M lookups in all; T tokens, whose numbers of lookups differ.
"""

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.ragged_gradient import reference


def ragged_gradient(
    table: Tensor,
    row_ids: Tensor,
    tokens: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    name: str = "table",
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of lookups that are listed one by one, as the owner of a few rows gets them.

    Args:
        table: [R, D], fp32, fp16 or bf16; on the CPU also fp64, computed by the reference.
        row_ids: [M], int32 or int64 in [0, R): the row of each lookup.
        tokens: [M], int32 or int64 in [0, T): whose output it was added to.
        scores: [M], fp32.
        grad_output: [T, D].
        name: what errors call the table.
        dtype: of the rows' gradients; by default the table's. fp32 is what they are summed in.

    Returns:
        The rows that are looked up, [U] int64, ascending; their gradients, [U, D] in `dtype`, each summed in fp32
        in the order of the list, so that a list in the order of the tokens gives row_gradient's bits (on a GPU up to
        rounding); and the scores' gradients, [M] in their dtype. The same bits each time.

    Raises:
        RowIdError: an id lies outside the table (CPU; on a GPU whoever made the list has checked it).
        ConfigError: shapes do not fit together.

    Cost: M·D elements read twice (grad_output and table), U·D written, and a stable sort of M ids.
    """
    if not row_ids.shape == tokens.shape == scores.shape or row_ids.ndim != 1:
        raise ConfigError(
            "listed lookups take row_ids, tokens and scores [M]; got "
            f'{list(row_ids.shape)}, {list(tokens.shape)} and {list(scores.shape)} for table "{name}"'
        )
    if grad_output.ndim != 2 or grad_output.shape[1] != table.shape[1]:
        raise ConfigError(
            f'grad_output must be [T, D={table.shape[1]}]; got {list(grad_output.shape)} for table "{name}"'
        )
    if not row_ids.numel():
        empty = table.new_empty(0, table.shape[1], dtype=dtype)
        return row_ids.new_empty(0, dtype=torch.int64), empty, scores.new_empty(0)
    if table.dtype == torch.float64:
        return reference.ragged_gradient(table, row_ids, tokens, scores, grad_output)
    dtype = dtype or table.dtype
    made = implementation.on_gpu("ragged_gradient") if table.is_cuda else implementation.on_cpu("ragged_gradient")
    grads: tuple[Tensor, Tensor, Tensor] = made.ragged_gradient(
        table, row_ids, tokens, scores, grad_output, dtype, name
    )
    return grads

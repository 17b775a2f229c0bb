"""row_gradient for tables too large for a dense one: the rows that are looked up, and their gradients."""

import torch
from torch import Tensor

from mfdist.kernels.lookup_arguments import check_grad_output, check_lookup
from mfdist.kernels.ragged_gradient import ragged_gradient
from mfdist.kernels.row_id_check import bad_id_error


def sparse_row_gradient(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int = 0, name: str = "table"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `gather_sum` in the rows that it read, and in the scores.

    Args:
        table: [R, D], as given to gather_sum; so are `row_ids`, `scores`, `code_stride` and `name`.
        row_ids: [N, K].
        scores: [N, K].
        grad_output: [N, D], the gradient of gather_sum's output.
        code_stride: see gather_sum.
        name: what errors call the table.

    Returns:
        The rows that are looked up, [U] int64, ascending, as `row_update` takes them; their gradients, [U, D] in
        table.dtype, each summed in fp32 in the order of the tokens; and the scores' gradients, [N, K] in their dtype.

    Raises:
        RowIdError: an id lies outside the table; nothing was read.
        ConfigError: shapes, dtypes or devices do not fit together.

    Cost: N·K·D elements read twice, U·D written; N·K ids in int64; on a GPU it waits for U.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    check_grad_output(table, row_ids, grad_output, name)
    num_tokens, num_lookups = row_ids.shape
    if error := bad_id_error(row_ids, code_stride or table.shape[0], name, is_code=code_stride > 0):
        raise error
    ids = row_ids.long() + code_stride * torch.arange(num_lookups, device=row_ids.device)
    tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(num_lookups)
    rows, grads, grad_scores = ragged_gradient(table, ids.flatten(), tokens, scores.flatten(), grad_output, name)
    return rows, grads, grad_scores.view(num_tokens, num_lookups)

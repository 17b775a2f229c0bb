"""row_gradient for rows that are updated once all ranks' squares are known: in full precision, and which were read."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfdist.kernels import implementation
from mfdist.kernels.lookup_arguments import check_grad_output, check_lookup
from mfdist.kernels.row_gradient import reference
from mfdist.kernels.row_id_check import bad_id_error

if TYPE_CHECKING:
    from mfdist.kernels.row_gradient.triton_ordered import Ordered


def marked_row_gradient(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    code_stride: int = 0,
    name: str = "table",
    ordered: "Ordered | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `gather_sum` in all rows, which rows it read, and the gradients in the scores.

    Where most rows are read it is cheaper than `sparse_row_gradient`: nothing is sorted, and no GPU is waited for.

    Args:
        table: [R, D], as given to gather_sum; so are `row_ids`, `scores`, `code_stride` and `name`.
        row_ids: [N, K].
        scores: [N, K].
        grad_output: [N, D], the gradient of gather_sum's output.
        code_stride: see gather_sum.
        name: what errors call the table.
        ordered: what `order_lookups` made of this lookup, if it was asked.

    Returns:
        The gradients [R, D] in fp32, or table.dtype where that is wider, each summed in the order of the tokens and 0
        where no id points; whether a row was looked up, [R] bool; and the scores' gradients, [N, K] in their dtype.

    Raises:
        RowIdError: an id lies outside the table; when, see gather_sum.
        ConfigError: shapes, dtypes or devices do not fit together.

    Cost: N·K·D elements read twice, R·D numbers of four bytes written.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    check_grad_output(table, row_ids, grad_output, name)
    dtype = torch.promote_types(table.dtype, torch.float32)
    if table.is_cuda:
        on_gpu = implementation.on_gpu("row_gradient")
        made: tuple[Tensor, Tensor, Tensor] = on_gpu.marked_row_gradient(
            table, row_ids, scores, grad_output, code_stride, name, dtype, ordered
        )
        return made
    if error := bad_id_error(row_ids, code_stride or table.shape[0], name, is_code=code_stride > 0):
        raise error
    if dtype == torch.float64:
        grads, grad_scores = reference.row_gradient(table, row_ids, scores, grad_output, code_stride)
    else:
        on_cpu = implementation.on_cpu("row_gradient")
        grads, grad_scores = on_cpu.row_gradient(table, row_ids, scores, grad_output, code_stride, name, dtype)
    is_read = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device)
    is_read[row_ids.long() + code_stride * torch.arange(row_ids.shape[1], device=table.device)] = True
    return grads, is_read, grad_scores

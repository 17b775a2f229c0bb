"""row_gradient as a torch operator: dispatch by device and shapes for the compiler; it has no gradient of its own."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from mfdist.kernels import implementation
from mfdist.kernels.lookup_arguments import check_grad_output, check_lookup
from mfdist.kernels.row_gradient import reference

torch.library.define(
    "mfdist::row_gradient",
    "(Tensor table, Tensor row_ids, Tensor scores, Tensor grad_output, int code_stride, str name) -> (Tensor, Tensor)",
)
#: What autograd calls with arguments that gather_sum has checked.
row_gradient_unchecked = torch.ops.mfdist.row_gradient.default


def row_gradient(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int = 0, name: str = "table"
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gather_sum` in the table and in the scores.

    Args:
        table: [R, D], as given to gather_sum; so are `row_ids`, `scores`, `code_stride` and `name`.
        row_ids: [N, K].
        scores: [N, K].
        grad_output: [N, D], the gradient of gather_sum's output.
        code_stride: see gather_sum.
        name: what errors call the table.

    Returns:
        The dense gradient of the table, [R, D] in table.dtype, each row summed in fp32 in the order of the tokens, 0
        where no id points; and that of the scores, [N, K] in their dtype. Both are new, and the same bits each time.

    Raises:
        RowIdError: an id lies outside the table; when, see gather_sum.
        ConfigError: shapes, dtypes or devices do not fit together.

    Cost: N·K·D elements read twice (grad_output and table), R·D written.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    check_grad_output(table, row_ids, grad_output, name)
    grads: tuple[Tensor, Tensor] = row_gradient_unchecked(table, row_ids, scores, grad_output, code_stride, name)
    return grads


@torch.library.impl("mfdist::row_gradient", "CPU")
def _on_cpu(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int, name: str
) -> tuple[Tensor, Tensor]:
    if table.dtype == torch.float64:
        from mfdist.kernels.cpu_ids import checked_ids

        checked_ids(row_ids, code_stride or table.shape[0], name, is_code=code_stride > 0)
        return reference.row_gradient(table, row_ids, scores, grad_output, code_stride)
    made: tuple[Tensor, Tensor] = implementation.on_cpu("row_gradient").row_gradient(
        table, row_ids, scores, grad_output, code_stride, name
    )
    return made


@torch.library.impl("mfdist::row_gradient", "CUDA")
def _on_gpu(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int, name: str
) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = implementation.on_gpu("row_gradient").row_gradient(
        table, row_ids, scores, grad_output, code_stride, name
    )
    return made


@torch.library.register_fake("mfdist::row_gradient")
def _shapes_of(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int, name: str
) -> tuple[Tensor, Tensor]:
    return table.new_empty(table.shape), scores.new_empty(scores.shape)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "gather_sum can be differentiated once; got a second derivative; take the first one without create_graph=True"
    )


torch.library.register_autograd("mfdist::row_gradient", _no_second_gradient)

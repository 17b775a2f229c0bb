"""gather_sum as a torch operator: dispatch by device, shapes for the compiler, autograd."""

from typing import Any

import torch
from torch import Tensor

from mfdist.kernels import implementation
from mfdist.kernels.gather_sum import reference
from mfdist.kernels.lookup_arguments import check_lookup
from mfdist.kernels.row_gradient.op import row_gradient_unchecked

torch.library.define(
    "mfdist::gather_sum", "(Tensor table, Tensor row_ids, Tensor scores, int code_stride, str name) -> Tensor"
)
_gather_sum = torch.ops.mfdist.gather_sum.default


def gather_sum(table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int = 0, name: str = "table") -> Tensor:
    """Return the score-weighted sum of K rows for each token.

    Args:
        table: [R, D], fp32, fp16 or bf16; R · D may exceed 2**31. On the CPU also fp64, computed by the reference.
        row_ids: [N, K], uint8, uint16, int32 or int64; N and K may be 0; duplicates add up.
        scores: [N, K], fp32.
        code_stride: 0 where `row_ids` are rows. S > 0 where they are codes in [0, S) and lookup k owns the rows from
            k · S on: R must be K · S, and no wider ids need be made.
        name: what errors call the table.

    Returns:
        [N, D] in table.dtype, never aliasing the table, summed in fp32 in the order k = 0..K-1 (on a GPU, for few
        tokens, in fixed interleaved parts of it). Differentiable in table (a dense gradient in its dtype, each row
        summed in fp32 in the order of the tokens) and in scores; not twice.

    Raises:
        RowIdError: an id lies outside the table. On the CPU nothing was read. On a GPU the outputs that used the id are
            NaN and the error comes from the next call, or from `check_errors`.
        ConfigError: shapes, dtypes or devices do not fit together.
        NotImplementedError: table or scores carry a tangent of forward-mode differentiation.

    Cost: N·K·D elements read from the table, N·D written.
    Source: MemoryFormer (arXiv 2411.12992), equation 11.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    out: Tensor = _gather_sum(table, row_ids, scores, code_stride, name)
    return out


@torch.library.impl("mfdist::gather_sum", "CPU")
def _on_cpu(table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int, name: str) -> Tensor:
    if table.dtype == torch.float64:
        from mfdist.kernels.cpu_ids import checked_ids

        checked_ids(row_ids, code_stride or table.shape[0], name, is_code=code_stride > 0)
        return reference.gather_sum(table, row_ids, scores, code_stride)
    made: Tensor = implementation.on_cpu("gather_sum").gather_sum(table, row_ids, scores, code_stride, name)
    return made


@torch.library.impl("mfdist::gather_sum", "CUDA")
def _on_gpu(table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int, name: str) -> Tensor:
    made: Tensor = implementation.on_gpu("gather_sum").gather_sum(table, row_ids, scores, code_stride, name)
    return made


@torch.library.register_fake("mfdist::gather_sum")
def _shape_of(table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int, name: str) -> Tensor:
    return table.new_empty(row_ids.shape[0], table.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, row_ids, scores, ctx.code_stride, ctx.name = inputs
    ctx.save_for_backward(table, row_ids, scores)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_table, grad_scores = row_gradient_unchecked(*ctx.saved_tensors, grad_output, ctx.code_stride, ctx.name)
    return grad_table, None, grad_scores, None, None


torch.library.register_autograd("mfdist::gather_sum", _backward, setup_context=_keep)

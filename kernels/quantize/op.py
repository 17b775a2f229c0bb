"""The lookup of quantised rows as a torch operator: dispatch by device, shapes for the compiler, no gradient."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.lookup_arguments import check_lookup
from mfdist.kernels.quantize.rows import LARGEST, QuantizedRows, check_rows

torch.library.define(
    "mfdist::quantized_gather_sum",
    "(Tensor values, Tensor scales, Tensor row_ids, Tensor scores, int code_stride, str name, ScalarType dtype)"
    " -> Tensor",
)
_quantized_gather_sum = torch.ops.mfdist.quantized_gather_sum.default


def quantized_gather_sum(
    rows: QuantizedRows,
    row_ids: Tensor,
    scores: Tensor,
    code_stride: int = 0,
    name: str = "table",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the score-weighted sum of K quantised rows for each token.

    Args:
        rows: what `quantize` returned.
        row_ids: [N, K], as for `gather_sum`; so are `scores`, `code_stride` and `name`.
        scores: [N, K], fp32.
        code_stride: see gather_sum.
        name: what errors call the table.
        dtype: of the result, fp32, fp16 or bf16.

    Returns:
        [N, D] in `dtype`, Σ_k (scores[n, k] · scale) · values in fp32, in gather_sum's order. It is for inference: a
        backward through it is an error.

    Raises:
        RowIdError: an id lies outside the table; when, see gather_sum.
        ConfigError: shapes, dtypes or devices do not fit together.
        NotImplementedError: by a backward.

    Cost: N·K·D bytes read, N·D elements written.
    """
    check_rows(rows, name)
    check_lookup(rows.values, row_ids, scores, code_stride, name, row_dtypes=tuple(LARGEST))
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f'quantised rows are summed to fp32, fp16 or bf16; got {dtype} for table "{name}"')
    out: Tensor = _quantized_gather_sum(rows.as_bytes, rows.scales, row_ids, scores, code_stride, name, dtype)
    return out


@torch.library.impl("mfdist::quantized_gather_sum", "CPU")
def _on_cpu(values: Tensor, scales: Tensor, *lookup: Any) -> Tensor:
    return _with(implementation.on_cpu("gather_sum"), values, scales, *lookup)


@torch.library.impl("mfdist::quantized_gather_sum", "CUDA")
def _on_gpu(values: Tensor, scales: Tensor, *lookup: Any) -> Tensor:
    return _with(implementation.on_gpu("gather_sum"), values, scales, *lookup)


def _with(implemented: Any, values: Tensor, scales: Tensor, *lookup: Any) -> Tensor:
    """Return the sum by gather_sum's own kernels."""
    *arguments, dtype = lookup
    made: Tensor = implemented.gather_sum(values, *arguments, scales=scales, dtype=dtype)
    return made


@torch.library.register_fake("mfdist::quantized_gather_sum")
def _shape_of(
    values: Tensor,
    scales: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    code_stride: int,
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty(row_ids.shape[0], values.shape[1], dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name = inputs[5]


def _no_gradient(ctx: Any, grad_output: Tensor) -> NoReturn:
    raise NotImplementedError(
        f'quantised rows are for inference and have no backward; got one through table "{ctx.name}"; '
        "train the table as it was before quantize, or look up under torch.no_grad()"
    )


torch.library.register_autograd("mfdist::quantized_gather_sum", _no_gradient, setup_context=_keep)

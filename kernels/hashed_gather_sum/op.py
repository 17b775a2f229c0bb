"""hashed_gather_sum as a torch operator: dispatch by device and shapes for the compiler; it has no gradient."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.forward_mode import refuse_tangents
from mfdist.kernels.gather_sum import reference as sums
from mfdist.kernels.hashed_gather_sum.norm import Norm, normalised
from mfdist.kernels.lookup_arguments import ROW_DTYPES
from mfdist.kernels.sign_hash import reference as hashes
from mfdist.kernels.sign_hash.op import check_hash

# `eps` is None where there is no norm.
torch.library.define(
    "mfdist::hashed_gather_sum",
    "(Tensor table, Tensor x, int bits, str score, float temperature, str name, bool is_centred=False, "
    "float? eps=None, Tensor? weight=None, Tensor? shift=None, Tensor? bias=None, Tensor? residual=None) -> Tensor",
)
_hashed_gather_sum = torch.ops.mfdist.hashed_gather_sum.default


def hashed_gather_sum(
    table: Tensor,
    x: Tensor,
    bits: int,
    score: str = "paper",
    temperature: float = 1.0,
    name: str = "table",
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return gather_sum of the codes and scores that sign_hash gives, without writing them where tokens are few.

    Args:
        table: [K·2^bits, D], as for `gather_sum`.
        x: [N, d], as for `sign_hash`, and so are `bits`, `score` and `temperature`; K = d / bits. fp64 only
            where the table is.
        bits: activations a chunk.
        score: "paper" or "released".
        temperature: t > 0.
        name: what errors call the table.
        norm: what x goes through first; its tensors [d] in x's dtype.
        bias: [D] in table.dtype, added to each token's sum.
        residual: [N, D] in table.dtype, added too.

    Returns:
        [N, D] in table.dtype. It is for inference: a backward through it is an error.

    Raises:
        ConfigError: a value is out of range, or shapes, dtypes or devices do not fit together.
        NotImplementedError: by a backward, or where a tensor carries a tangent of forward-mode differentiation.

    Cost: N·d and N·K·D elements read, N·D written. On a GPU one kernel for few tokens; otherwise what the norm,
        sign_hash, gather_sum and the sums cost.
    """
    check_hash(x, bits, score, temperature)
    refuse_tangents("a lookup", table, bias, residual)
    num_rows = x.shape[1] // bits << bits
    if table.ndim != 2 or table.shape[0] != num_rows or table.device != x.device:
        raise ConfigError(
            f"the table must be [K · 2^bits, D] = [{num_rows}, D] on {x.device}; got {list(table.shape)} on "
            f'{table.device} for table "{name}"'
        )
    if table.dtype not in ROW_DTYPES or (x.dtype == torch.float64 and table.dtype != torch.float64):
        raise ConfigError(
            "a table's rows must be in fp32, fp16 or bf16, or in fp64, as they must be where the activations are; got "
            f'rows in {table.dtype} and activations in {x.dtype} for table "{name}"; cast one'
        )
    if norm is None and bias is None and residual is None:
        out: Tensor = _hashed_gather_sum(table, x, bits, score, temperature, name)
        return out
    norm_arguments: tuple[Any, ...] = (False, None, None, None)
    if norm is not None:
        _check_like("norm's weight", norm.weight, x.shape[1:], x, name)
        _check_like("norm's shift", norm.shift, x.shape[1:], x, name)
        norm_arguments = norm.is_centred, norm.eps, norm.weight, norm.shift
    _check_like("bias", bias, table.shape[1:], table, name)
    _check_like("residual", residual, (x.shape[0], table.shape[1]), table, name)
    made: Tensor = _hashed_gather_sum(table, x, bits, score, temperature, name, *norm_arguments, bias, residual)
    return made


def _check_like(what: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, name: str) -> None:
    """Raise ConfigError unless a tensor that is there has the shape, and the other tensor's dtype and device."""
    if tensor is not None and (tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device):
        raise ConfigError(
            f"the {what} must be {list(shape)} in {like.dtype} on {like.device}; got {list(tensor.shape)} in "
            f'{tensor.dtype} on {tensor.device} for table "{name}"'
        )


@torch.library.impl("mfdist::hashed_gather_sum", "CPU")
def _on_cpu(
    table: Tensor,
    x: Tensor,
    bits: int,
    score: str,
    temperature: float,
    name: str,
    is_centred: bool = False,
    eps: float | None = None,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if eps is not None:
        x = normalised(x, Norm(is_centred, eps, weight, shift))
    if table.dtype == torch.float64:
        made = sums.gather_sum(table, *hashes.sign_hash(x, bits, score, temperature), 1 << bits)
    else:
        codes, scores = implementation.on_cpu("sign_hash").sign_hash(x, bits, score, temperature)
        made = implementation.on_cpu("gather_sum").gather_sum(table, codes, scores, 1 << bits, name)
    for addend in (bias, residual):
        if addend is not None:
            made = made + addend
    return made


@torch.library.impl("mfdist::hashed_gather_sum", "CUDA")
def _on_gpu(
    table: Tensor,
    x: Tensor,
    bits: int,
    score: str,
    temperature: float,
    name: str,
    is_centred: bool = False,
    eps: float | None = None,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    norm = None if eps is None else Norm(is_centred, eps, weight, shift)
    made: Tensor = implementation.on_gpu("hashed_gather_sum").hashed_gather_sum(
        table, x, bits, score, temperature, name, norm=norm, bias=bias, residual=residual
    )
    return made


@torch.library.register_fake("mfdist::hashed_gather_sum")
def _shape_of(table: Tensor, x: Tensor, *others: object) -> Tensor:
    return table.new_empty(x.shape[0], table.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name = inputs[5]


def _no_gradient(ctx: Any, grad_output: Tensor) -> NoReturn:
    raise NotImplementedError(
        f'hashed_gather_sum is for inference and has no backward; got one through table "{ctx.name}"; '
        "call sign_hash and gather_sum"
    )


torch.library.register_autograd("mfdist::hashed_gather_sum", _no_gradient, setup_context=_keep)

"""sign_hash as a torch operator: dispatch by device, shapes for the compiler, autograd."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.forward_mode import refuse_tangents
from mfdist.kernels.sign_hash import reference
from mfdist.kernels.sign_hash.codes import code_dtype

_MAX_BITS = 24
_SCORES = ("paper", "released")

# The scores come first: torch.library.opcheck adds the outputs up, starting in the first one's dtype.
torch.library.define(
    "mfdist::sign_hash", "(Tensor x, int bits, str score, float temperature) -> (Tensor scores, Tensor codes)"
)
torch.library.define(
    "mfdist::sign_hash_gradient", "(Tensor x, Tensor grad_scores, int bits, str score, float temperature) -> Tensor"
)
_sign_hash = torch.ops.mfdist.sign_hash.default
_sign_hash_gradient = torch.ops.mfdist.sign_hash_gradient.default


def sign_hash(x: Tensor, bits: int, score: str = "paper", temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the code and the score of each chunk of `bits` activations.

    With z the chunk and t the temperature, p(z) = Π_i 1 / (1 + exp(−2|z_i| / t)). A code's bits are z_i ≥ 0, the first
    activation giving the highest.

    Args:
        x: [N, d], fp32, fp16 or bf16, any strides; N may be 0. On the CPU also fp64, computed by the reference.
        bits: activations a chunk, 1 to 24; divides d.
        score: "paper" for p(z), "released" for ‖z‖₁ · p(z).
        temperature: t > 0.

    Returns:
        Codes [N, K], K = d / bits, uint8 up to 8 bits, uint16 up to 16 and int32 beyond; and scores [N, K] in fp32,
        computed in fp32 and differentiable, once, in x, through p and the norm alone. The slope of |z| at 0 is 0, as
        torch has it; 0.0 and −0.0 both give bit 1. NaN gives bit 0, a NaN score, and NaN gradients in its chunk. ±inf
        gives a factor 1 of p and no gradient to itself ("released": the score inf, and gradients that are not finite).

    Raises:
        ConfigError: a value is out of range or `bits` does not divide d.
        NotImplementedError: x carries a tangent of forward-mode differentiation.

    Cost: N·d elements read, N·K codes and scores written.
    Source: MemoryFormer (arXiv 2411.12992), equations 4–10.
    """
    check_hash(x, bits, score, temperature)
    scores, codes = _sign_hash(x, bits, score, temperature)
    return codes, scores


def check_hash(x: Tensor, bits: int, score: str, temperature: float) -> None:
    """Raise ConfigError unless a value is in range and the activations can be cut into chunks of `bits`.

    A tangent of forward-mode differentiation is a NotImplementedError.
    """
    refuse_tangents("sign_hash", x)
    if x.ndim != 2 or not x.is_floating_point():
        remedy = "flatten them" if x.is_floating_point() else "cast them"
        raise ConfigError(
            f"sign_hash takes floating-point activations [N, d]; got {list(x.shape)} in {x.dtype}; {remedy}"
        )
    if not 1 <= bits <= _MAX_BITS or x.shape[1] % bits:
        raise ConfigError(f"bits must lie in 1..{_MAX_BITS} and divide d; got bits={bits}, d={x.shape[1]}")
    if score not in _SCORES:
        raise ConfigError(f'score must be one of {", ".join(_SCORES)}; got "{score}"')
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive; got {temperature}")


@torch.library.impl("mfdist::sign_hash", "CPU")
def _on_cpu(x: Tensor, bits: int, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        codes, scores = reference.sign_hash(x, bits, score, temperature)
        return scores, codes.to(code_dtype(bits))
    codes, scores = implementation.on_cpu("sign_hash").sign_hash(x, bits, score, temperature)
    return scores, codes


@torch.library.impl("mfdist::sign_hash_gradient", "CPU")
def _gradient_on_cpu(x: Tensor, grad_scores: Tensor, bits: int, score: str, temperature: float) -> Tensor:
    if x.dtype == torch.float64:
        return reference.sign_hash_gradient(x, grad_scores, bits, score, temperature)
    made: Tensor = implementation.on_cpu("sign_hash").sign_hash_gradient(x, grad_scores, bits, score, temperature)
    return made


@torch.library.impl("mfdist::sign_hash", "CUDA")
def _on_gpu(x: Tensor, bits: int, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    codes, scores = implementation.on_gpu("sign_hash").sign_hash(x, bits, score, temperature)
    return scores, codes


@torch.library.impl("mfdist::sign_hash_gradient", "CUDA")
def _gradient_on_gpu(x: Tensor, grad_scores: Tensor, bits: int, score: str, temperature: float) -> Tensor:
    made: Tensor = implementation.on_gpu("sign_hash").sign_hash_gradient(x, grad_scores, bits, score, temperature)
    return made


@torch.library.register_fake("mfdist::sign_hash")
def _shapes_of(x: Tensor, bits: int, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] // bits)
    return x.new_empty(shape, dtype=_score_dtype(x)), x.new_empty(shape, dtype=code_dtype(bits))


def _score_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mfdist::sign_hash_gradient")
def _gradient_shape_of(x: Tensor, grad_scores: Tensor, bits: int, score: str, temperature: float) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.bits, ctx.score, ctx.temperature = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_scores: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _sign_hash_gradient(x, grad_scores, ctx.bits, ctx.score, ctx.temperature), None, None, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "sign_hash can be differentiated once; got a second derivative; take the first one without create_graph=True"
    )


torch.library.register_autograd("mfdist::sign_hash", _backward, setup_context=_keep)
torch.library.register_autograd("mfdist::sign_hash_gradient", _no_second_gradient)

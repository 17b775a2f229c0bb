"""Who hashes activations: mfdist's kernels and the plain torch of their reference, forward and backward."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mfdist.benchmarks.contender import Comparison, Contender, Distance, Outputs
from mfdist.benchmarks.lookup_case import FLOATS
from mfdist.benchmarks.timing import Work
from mfdist.kernels import sign_hash
from mfdist.kernels.sign_hash import reference

_BITS = 8
_SCORE = "paper"
_SCORE_BYTES = 4

#: Shapes [N, d] of the activations.
CASES = {
    "cuda": {"base-qkv": (16384, 1024), "tiny-qkv": (32768, 512)},
    "cpu": {"base-train": (2048, 1024), "tiny-train": (4096, 512)},
}


class _Arguments(NamedTuple):
    x: Tensor
    grad_scores: Tensor
    bits: int


def comparisons(name: str, shape: tuple[int, int], device: str) -> Iterator[Comparison]:
    """Yield what is compared on activations of a shape."""
    makers = {"sign_hash": (_hash, _plain_hash), "sign_hash_gradient": (_gradient, _plain_gradient)}
    for op, (ours, plain) in makers.items():
        contenders = {}
        for kind, dtype in FLOATS.items():
            contenders[f"mfdist-{kind}"] = lambda make=ours, dtype=dtype: make(_make(shape, dtype, device))
            contenders[f"torch-{kind}"] = lambda make=plain, dtype=dtype: make(_make(shape, dtype, device))
        yield Comparison(op=op, case=name, ceiling="copy", contenders=contenders)


def forward_and_backward(shape: tuple[int, int], bits: int, dtype: torch.dtype, device: str) -> list[Contender]:
    """Return mfdist's kernels that hash activations [N, d] and take the gradient back to them."""
    arguments = _make(shape, dtype, device, bits)
    return [_hash(arguments), _gradient(arguments)]


def _make(shape: tuple[int, int], dtype: torch.dtype, device: str, bits: int = _BITS) -> _Arguments:
    generator = torch.Generator(device).manual_seed(5)
    x = torch.randn(shape, device=device, generator=generator).to(dtype)
    return _Arguments(x, torch.randn(shape[0], shape[1] // bits, device=device, generator=generator), bits)


def _hash(arguments: _Arguments) -> Contender:
    def call() -> Outputs:
        return sign_hash(arguments.x, arguments.bits, _SCORE)

    return Contender(
        work=Work(lambda _: call()),
        outputs=call,
        distances=lambda outputs: _hash_distances(arguments, outputs, torch.float32),
        num_bytes=_hash_bytes(arguments),
        repeats=True,
    )


def _plain_hash(arguments: _Arguments) -> Contender:
    def call() -> Outputs:
        return reference.sign_hash(arguments.x, arguments.bits, _SCORE, 1.0)

    return Contender(
        work=Work(lambda _: call()),
        outputs=call,
        distances=lambda outputs: _hash_distances(arguments, outputs, None),
        num_bytes=_hash_bytes(arguments),
    )


def _gradient(arguments: _Arguments) -> Contender:
    def call() -> Tensor:
        made: Tensor = torch.ops.mfdist.sign_hash_gradient(*arguments, _SCORE, 1.0)
        return made

    return Contender(
        work=Work(lambda _: call()),
        outputs=lambda: (call(),),
        distances=lambda outputs: _gradient_distances(arguments, outputs),
        num_bytes=2 * arguments.x.nbytes + arguments.grad_scores.nbytes,
        repeats=True,
    )


def _plain_gradient(arguments: _Arguments) -> Contender:
    def call() -> Tensor:
        return reference.sign_hash_gradient(*arguments, _SCORE, 1.0)

    return Contender(
        work=Work(lambda _: call()),
        outputs=lambda: (call(),),
        distances=lambda outputs: _gradient_distances(arguments, outputs),
        num_bytes=2 * arguments.x.nbytes + arguments.grad_scores.nbytes,
    )


def _hash_bytes(arguments: _Arguments) -> int:
    code_bytes = 1 if arguments.bits <= 8 else 2
    return arguments.x.nbytes + arguments.grad_scores.numel() * (code_bytes + _SCORE_BYTES)


def _hash_distances(arguments: _Arguments, outputs: Outputs, dtype: torch.dtype | None) -> list[Distance]:
    codes, scores = reference.sign_hash(arguments.x.double(), arguments.bits, _SCORE, 1.0)
    return [
        Distance(torch.float64, [(outputs[0], codes)]),  # whole numbers, which must be the same
        Distance(dtype or outputs[1].dtype, [(outputs[1], scores)]),
    ]


def _gradient_distances(arguments: _Arguments, outputs: Outputs) -> list[Distance]:
    wide = (arguments.x.double(), arguments.grad_scores.double())
    expected = reference.sign_hash_gradient(*wide, arguments.bits, _SCORE, 1.0)
    return [Distance(outputs[0].dtype, [(outputs[0], expected)])]

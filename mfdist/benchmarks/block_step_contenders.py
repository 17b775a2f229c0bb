"""A training step of one block's projections: MemoryFormer's kernels for it, and its dense twin's products.

Forward, backward and update, one kernel after the other with inputs of its own. Attention and norms, which both blocks
have, are left out, and so are biases.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfdist.benchmarks import hash_contenders, lookup_contenders, update_contenders
from mfdist.benchmarks.contender import Comparison, Contender, Distance, Outputs
from mfdist.benchmarks.lookup_accounts import CHECKED_LR, TIMED_LR
from mfdist.benchmarks.lookup_case import CASES as LOOKUPS
from mfdist.benchmarks.lookup_case import FLOATS, LookupTensors
from mfdist.benchmarks.timing import Work

_RULE = update_contenders.RULES["row_update_adagrad"]

#: Names of lookups → those of the block: Q, K and V; to the wide layer; and back.
CASES = {
    "cuda": {
        "base-block": ("base-qkv-3d", "base-ffn1", "base-ffn2"),
        "tiny-block": ("tiny-qkv-3d", "tiny-ffn1", "tiny-ffn2"),
    },
    "cpu": {"demo-block": ("demo-qkv", "demo-ffn1", "demo-ffn2")},
}


def comparisons(name: str, lookups: Sequence[str], device: str) -> Iterator[Comparison]:
    """Yield the two blocks to compare."""
    kind = "bf16" if device == "cuda" else "fp32"
    contenders = {
        f"mfdist-{kind}": lambda: _memory(lookups, device, FLOATS[kind]),
        f"torch-{kind}": lambda: _dense(lookups, device, FLOATS[kind]),
    }
    yield Comparison(op="block_step", case=name, ceiling="copy", contenders=contenders)


def _memory(lookups: Sequence[str], device: str, dtype: torch.dtype) -> Contender:
    parts: list[Contender] = []
    for case in (LOOKUPS[device][name] for name in lookups):
        tensors = LookupTensors(case, device)
        bits = case.rows_each.bit_length() - 1
        shape = (case.num_tokens, case.num_lookups * bits)
        hash_forward, hash_backward = hash_contenders.forward_and_backward(shape, bits, dtype, device)
        lookup, update = lookup_contenders.sums(tensors, dtype), update_contenders.fused(tensors, dtype, _RULE)
        parts += [hash_forward, lookup, update, hash_backward]
    sizes: list[int] = []

    def outputs() -> Outputs:
        each = [part.outputs() for part in parts]
        sizes[:] = map(len, each)
        return tuple(itertools.chain(*each))

    def distances(found: Outputs) -> list[Distance]:
        ends = list(itertools.accumulate(sizes))
        each = [found[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return [one for part, own in zip(parts, each, strict=True) for one in part.distances(own)]

    return Contender(
        work=Work(lambda number: [part.work.call(number) for part in parts]),
        outputs=outputs,
        distances=distances,
        num_bytes=sum(part.num_bytes for part in parts),
        repeats=True,
    )


class _Linear(NamedTuple):
    x: Tensor
    grad: Tensor
    weight: Tensor


def _dense(lookups: Sequence[str], device: str, dtype: torch.dtype) -> Contender:
    back = LOOKUPS[device][lookups[-1]]
    num_tokens, d = back.num_tokens, back.row_dim
    generator = torch.Generator(device).manual_seed(8)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    shapes = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))  # qkv, attention's projection, ffn1, ffn2
    layers = [
        _Linear(random(num_tokens, inner), random(num_tokens, outer), random(outer, inner)) for outer, inner in shapes
    ]

    def step(lr: float, *, is_kept: bool) -> Outputs:
        made: list[Tensor] = []
        for x, grad, weight in layers:
            out, grad_x, grad_weight = F.linear(x, weight), grad @ weight, grad.T @ x
            made += [
                out,
                grad_x,
                weight.add(grad_weight, alpha=-lr) if is_kept else weight.add_(grad_weight, alpha=-lr),
            ]
        return tuple(made)

    def distances(found: Outputs) -> list[Distance]:
        measured = []
        for (x, grad, weight), *own in zip(layers, found[::3], found[1::3], found[2::3], strict=True):
            wide_x, wide_grad, wide = x.double(), grad.double(), weight.double()
            expected = (wide_x @ wide.T, wide_grad @ wide, wide - CHECKED_LR * wide_grad.T @ wide_x)
            measured += [Distance(dtype, [pair]) for pair in zip(own, expected, strict=True)]
        return measured

    return Contender(
        work=Work(lambda _: step(TIMED_LR, is_kept=False)),
        outputs=lambda: step(CHECKED_LR, is_kept=True),
        distances=distances,
        num_bytes=sum(3 * weight.nbytes + 2 * (x.nbytes + grad.nbytes) for x, grad, weight in layers),
    )

"""All projections of one block for a few tokens: MemoryFormer's hashing and lookups, and its dense twin's products.

Each projection has activations of its own, so that attention and norms, which both blocks have, stay out of it; so do
biases. Every call has other activations or weights, so many that no cache holds what the next one reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfdist.benchmarks import exact
from mfdist.benchmarks.contender import Comparison, Contender, Distance, Outputs
from mfdist.benchmarks.lookup_case import FLOATS, num_variants
from mfdist.benchmarks.timing import Work
from mfdist.kernels import hashed_gather_sum
from mfdist.kernels.sign_hash import reference

_SCORE = "paper"


@dataclass(frozen=True)
class BlockCase:
    """N tokens of d activations, and the type of the weights."""

    num_tokens: int
    hidden_dim: int
    kind: str = "bf16"


CASES = {
    "cuda": {
        "block-4k": BlockCase(1, 4096),
        "block-4k-8": BlockCase(8, 4096),
        "block-4k-64": BlockCase(64, 4096),
        "block-base": BlockCase(1, 1024),
        "block-base-8": BlockCase(8, 1024),
    },
    "cpu": {"block-base": BlockCase(1, 1024, "fp32"), "block-base-8": BlockCase(8, 1024, "fp32")},
}


class _Memory(NamedTuple):
    """One memory layer: activations [variants, N, d], bits a chunk, the table of all chunks."""

    x: Tensor
    bits: int
    table: Tensor


def comparisons(name: str, case: BlockCase, device: str) -> Iterator[Comparison]:
    """Yield the two blocks to compare."""
    contenders = {
        f"mfdist-{case.kind}": lambda: _memory(case, device),
        f"torch-{case.kind}": lambda: _dense(case, device),
    }
    yield Comparison(op="block", case=name, ceiling="read", is_inference=True, contenders=contenders)


def _memory(case: BlockCase, device: str) -> Contender:
    d, dtype = case.hidden_dim, FLOATS[case.kind]
    chunks = d // 8
    shapes = ((d, 8, 3 * d), (d, 8, 10 * chunks), (10 * chunks, 10, d))  # qkv, ffn1, ffn2: width, bits, row width
    call_bytes = case.num_tokens * chunks * sum(row_dim for *_, row_dim in shapes) * dtype.itemsize
    generator = torch.Generator(device).manual_seed(6)
    layers = []
    for width, bits, row_dim in shapes:
        x = torch.randn(
            num_variants(call_bytes), case.num_tokens, width, dtype=dtype, device=device, generator=generator
        )
        table = torch.randn(chunks << bits, row_dim, dtype=dtype, device=device, generator=generator)
        layers.append(_Memory(x, bits, table))

    def call(number: int) -> Outputs:
        outputs = []
        for x, bits, table in layers:
            outputs.append(hashed_gather_sum(table, x[number % len(x)], bits, _SCORE))
        return tuple(outputs)

    return Contender(
        work=Work(call, num_variants(call_bytes)),
        outputs=lambda: call(0),
        distances=lambda outputs: [_distance(layer, out) for layer, out in zip(layers, outputs, strict=True)],
        num_bytes=call_bytes,
        repeats=True,
    )


def _distance(layer: _Memory, out: Tensor) -> Distance:
    codes, scores = reference.sign_hash(layer.x[0].double(), layer.bits, _SCORE, 1.0)
    parts = exact.sums(layer.table, codes, scores, 1 << layer.bits)
    return Distance(out.dtype, ((out[tokens], expected) for tokens, expected in parts))


def _dense(case: BlockCase, device: str) -> Contender:
    d, dtype = case.hidden_dim, FLOATS[case.kind]
    shapes = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))  # qkv, attention's projection, ffn1, ffn2
    call_bytes = sum(rows * columns for rows, columns in shapes) * dtype.itemsize
    generator = torch.Generator(device).manual_seed(7)
    blocks = [
        [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]
        for _ in range(num_variants(call_bytes))
    ]
    inputs = [
        torch.randn(case.num_tokens, width, dtype=dtype, device=device, generator=generator) for _, width in shapes
    ]

    def call(number: int) -> Outputs:
        return tuple(F.linear(x, weight) for x, weight in zip(inputs, blocks[number % len(blocks)], strict=True))

    def distances(outputs: Outputs) -> list[Distance]:
        expected = [x.double() @ weight.double().T for x, weight in zip(inputs, blocks[0], strict=True)]
        return [Distance(dtype, [(out, right)]) for out, right in zip(outputs, expected, strict=True)]

    return Contender(work=Work(call, len(blocks)), outputs=lambda: call(0), distances=distances, num_bytes=call_bytes)

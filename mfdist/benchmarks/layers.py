"""One memory layer beside the linear layer it replaces, over numbers of tokens: where each of them is ahead.

Both are modules as a model has them, bias included, at inference. Every call has other activations and other weights,
so many that no cache holds what the next one reads: in a model other layers come between.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfdist.benchmarks import exact
from mfdist.benchmarks.contender import Distance
from mfdist.benchmarks.lookup_case import num_variants
from mfdist.benchmarks.timing import Work, timings
from mfdist.kernels.sign_hash import reference
from mfdist.layers import MemoryLayer

#: Tokens whose results are compared with float64.
_CHECKED_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class LayerSpeed:
    """What one call of either layer took: medians, and how far apart the quartiles are as shares of them."""

    in_features: int
    out_features: int
    num_tokens: int
    memory_us: float
    linear_us: float
    memory_spread: float
    linear_spread: float
    #: ‖got − expected‖ / ‖expected‖ of the memory layer and of the linear one, and what it may be.
    memory_error: float
    linear_error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """Return how many times as fast the memory layer is."""
        return self.linear_us / self.memory_us

    @property
    def is_wrong(self) -> bool:
        """Return whether either result was not the expected one; NaN is not."""
        return not (self.memory_error <= self.tolerance and self.linear_error <= self.tolerance)


@torch.inference_mode()
def measure_layers(
    in_features: int,
    out_features: int,
    num_tokens: Sequence[int],
    *,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.5,
) -> Iterator[LayerSpeed]:
    """Yield how long a call of each layer takes, for each number of tokens.

    Args:
        in_features, out_features: of both layers.
        num_tokens: of a call.
        bits: of the memory layer.
        dtype: of weights, rows and activations.
        device: "cpu" or "cuda"; there without what it costs to start a kernel, as in a CUDA graph.
        seconds: spent on each layer at each number of tokens.
    """
    made = {"device": device, "dtype": dtype}
    before = torch.get_rng_state()
    memory = MemoryLayer(in_features, out_features, bits, **made)  # type: ignore[arg-type]
    weight_bytes = in_features * out_features * dtype.itemsize
    linears = [nn.Linear(in_features, out_features, **made) for _ in range(num_variants(weight_bytes))]  # type: ignore[arg-type]
    torch.set_rng_state(before)
    rows_bytes = in_features // bits * out_features * dtype.itemsize
    for count in num_tokens:
        generator = torch.Generator(device).manual_seed(8)
        shape = (num_variants(count * rows_bytes), count, in_features)
        inputs = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        errors = [_memory_distance(memory, inputs[0]), _linear_distance(linears[0], inputs[0])]
        remembered, multiplied = timings(_works(memory, linears, inputs), device, seconds)
        yield LayerSpeed(
            in_features=in_features,
            out_features=out_features,
            num_tokens=count,
            memory_us=remembered.median_us,
            linear_us=multiplied.median_us,
            memory_spread=remembered.spread,
            linear_spread=multiplied.spread,
            memory_error=errors[0].relative,
            linear_error=errors[1].relative,
            tolerance=errors[0].tolerance,
        )


def crossover(speeds: Sequence[LayerSpeed]) -> float | None:
    """Return the number of tokens at which both layers are as fast, between two that were measured.

    Returns:
        A point on the line between the two, on logarithmic scales; 0 where the memory layer is behind from the first
        number on; None where it is ahead up to the last.
    """
    if speeds[0].ratio < 1:
        return 0.0
    for one, two in itertools.pairwise(speeds):
        if two.ratio < 1:
            high, low = math.log(one.ratio), math.log(two.ratio)
            share = high / (high - low)
            return math.exp(math.log(one.num_tokens) * (1 - share) + math.log(two.num_tokens) * share)
    return None


def _works(memory: MemoryLayer, linears: Sequence[nn.Linear], inputs: Tensor) -> list[Work]:
    # Turns of few calls would begin with the same ones every time.
    calls = itertools.count()

    def remember(_: int) -> Tensor:
        out: Tensor = memory(inputs[next(calls) % len(inputs)])
        return out

    def multiply(_: int) -> Tensor:
        number = next(calls)
        out: Tensor = linears[number % len(linears)](inputs[number % len(inputs)])
        return out

    return [Work(remember, len(inputs)), Work(multiply, len(linears))]


def _memory_distance(layer: MemoryLayer, x: Tensor) -> Distance:
    x, rows, bias = x[:_CHECKED_TOKENS], layer.table.resident_rows, layer.bias
    assert rows is not None and bias is not None
    addressing = layer.hash
    codes, scores = reference.sign_hash(x.double(), addressing.bits, addressing.score, addressing.temperature)
    out = layer(x)
    parts = exact.sums(rows, codes, scores, addressing.code_stride)
    return Distance(out.dtype, ((out[tokens], expected + bias.double()) for tokens, expected in parts))


def _linear_distance(layer: nn.Linear, x: Tensor) -> Distance:
    x = x[:_CHECKED_TOKENS]
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    out = layer(x)
    return Distance(out.dtype, [(out, expected)])

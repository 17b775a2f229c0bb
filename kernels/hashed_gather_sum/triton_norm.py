"""RMSNorm and LayerNorm in Triton: of a block that a kernel holds, and as a kernel that others are chained to."""

import triton
import triton.language as tl
from torch import Tensor

from mfdist.kernels.hashed_gather_sum.norm import Norm
from mfdist.kernels.triton_chain import prefetch, start_next, wait_for_inputs
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, can_chain, chain_options, device_of, next_power_of_2

#: Activations that a program reads at a time, at most, and those of a warp.
_BLOCK = 8192
_WARP = 512


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """Return activations [N, d] after the norm, in x's dtype; a program for each token, for few of them."""
    x = x.contiguous()
    weight, shift = (each if each is None else each.contiguous() for each in (norm.weight, norm.shift))
    out = x.new_empty(x.shape)
    block = min(_BLOCK, next_power_of_2(x.shape[1]))
    warps = min(16, max(1, block // _WARP))
    is_chained = can_chain(x)
    options = {"num_warps": warps, **LAUNCH_OPTIONS, **chain_options(is_chained=is_chained)}
    with device_of(x):
        _normalise[(len(x),)](
            x, weight, shift, out, x.shape[1], norm.eps, norm.is_centred, block, 32 * warps, is_chained, **options
        )
    return out


@triton.jit
def _normalise(
    x, weight, shift, out, size, eps,
    IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr, SECTORS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if IS_CHAINED:
        prefetch_parts(weight, shift, size, n, SECTORS)
        wait_for_inputs()
    x += n * size
    mean, total = 0.0, tl.zeros([BLOCK], tl.float32)
    if IS_CENTRED:
        for first in range(0, size, BLOCK):
            total += tl.load(x + first + i, mask=first + i < size, other=0.0).to(tl.float32)
        mean = tl.sum(total) / size
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        z = tl.load(x + first + i, mask=first + i < size, other=0.0).to(tl.float32)
        z = tl.where(first + i < size, z - mean, 0.0)
        squares += z * z
    scale = 1.0 / tl.sqrt(tl.sum(squares) / size + eps)
    if IS_CHAINED:
        start_next()
    for first in range(0, size, BLOCK):
        is_wanted = first + i < size
        z = (tl.load(x + first + i, mask=is_wanted, other=0.0).to(tl.float32) - mean) * scale
        if weight is not None:
            z *= tl.load(weight + first + i, mask=is_wanted, other=0.0).to(tl.float32)
        if shift is not None:
            z += tl.load(shift + first + i, mask=is_wanted, other=0.0).to(tl.float32)
        tl.store(out + n * size + first + i, z.to(out.dtype.element_ty), mask=is_wanted)


@triton.jit
def prefetch_parts(weight, shift, size, part, SECTORS: tl.constexpr):
    """Bring one part of a norm's tensors nearer, before waiting for the activations."""
    if weight is not None:
        prefetch(weight, size, part, SECTORS)
    if shift is not None:
        prefetch(shift, size, part, SECTORS)

"""RMSNorm and LayerNorm inside Triton kernels: each program takes the statistics of the token that it reads."""

import triton
import triton.language as tl


@triton.jit
def statistics(x, size, eps, IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """Return what is taken off each of `size` activations, and what they are multiplied by then.

    Args:
        x: pointer to the first.
        BLOCK: how many are read at a time; one read is fastest.
    """
    i = tl.arange(0, BLOCK)
    mean = 0.0
    if IS_CENTRED:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, size, BLOCK):
            total += tl.load(x + first + i, mask=first + i < size, other=0.0).to(tl.float32)
        mean = tl.sum(total) / size
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        z = tl.load(x + first + i, mask=first + i < size, other=0.0).to(tl.float32)
        z = tl.where(first + i < size, z - mean, 0.0)
        squares += z * z
    return mean, 1.0 / tl.sqrt(tl.sum(squares) / size + eps)


@triton.jit
def apply_norm(z, mean, scale, weight, shift, at, is_wanted, DTYPE: tl.constexpr):
    """Return activations after the norm, rounded to DTYPE, as fp32; 0 where they are not wanted.

    Args:
        z: a block of fp32.
        mean, scale: from `statistics`.
        weight, shift: pointers to the norm's, or None.
        at: which activation of the token each is.
    """
    z = (z - mean) * scale
    if weight is not None:
        z *= tl.load(weight + at, mask=is_wanted, other=0.0).to(tl.float32)
    if shift is not None:
        z += tl.load(shift + at, mask=is_wanted, other=0.0).to(tl.float32)
    return tl.where(is_wanted, z.to(DTYPE).to(tl.float32), 0.0)

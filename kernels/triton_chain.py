"""Kernels that start while the one before still runs, and wait inside: at decode, launching takes as long as a lookup.

For kernels launched with `chain_options`, where `can_chain`.
"""

import triton
import triton.language as tl

#: What the second-level cache reads of memory at a time.
SECTOR_BYTES = 32
_SECTOR_BITS = tl.constexpr(8 * SECTOR_BYTES)


@triton.jit
def prefetch(start, size, part, SECTORS: tl.constexpr):
    """Bring elements that are read after waiting into the second-level cache; before `wait_for_inputs`.

    Caches agree there: what the kernel before still writes is read as it will be.

    Args:
        start: pointer to the first of them.
        size: how many there are.
        part: which part of them, each of SECTORS sectors; past the last nothing new is read.
    """
    i = (part * SECTORS + tl.arange(0, SECTORS)) * (_SECTOR_BITS // start.dtype.element_ty.primitive_bitwidth)
    address = (start + tl.minimum(i, size - 1)).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, False, 1)


@triton.jit
def wait_for_inputs():
    """Wait until what the kernels before this one wrote can be read; every program calls it before it reads."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def start_next():
    """Let the next kernel start once all programs have called this or ended; it waits for what they write.

    Every program calls it after `wait_for_inputs`: then the kernel before this one has ended when the next one starts.
    """
    tl.extra.cuda.gdc_launch_dependents()

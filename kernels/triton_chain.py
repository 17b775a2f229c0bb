"""Kernels that start while the one before still runs, and wait inside: at decode, launching takes as long as a lookup.

For kernels launched with `chain_options`, where `can_chain`.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs():
    """Wait until what the kernels before this one wrote can be read; every program calls it before it reads."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def start_next():
    """Let the next kernel start once all programs have called this or ended; it waits for what they write."""
    tl.extra.cuda.gdc_launch_dependents()

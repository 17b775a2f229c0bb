"""What the Triton kernels share on the host: whether there is a Triton, and sizes."""

import importlib.util

from torch import Tensor

from mfdist.errors import ConfigError


def needs_triton(tensor: Tensor) -> None:
    """Raise ConfigError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"tensors on {tensor.device} need Triton, which is not installed; pip install triton, or use the CPU"
        )


def next_power_of_2(size: int) -> int:
    """Return the least power of two that is at least `size`, which must be positive."""
    return 1 << (size - 1).bit_length()

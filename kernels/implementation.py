"""The lazy way from an operator to its fast implementation, which brings a compiler with it."""

import functools
import importlib
import importlib.util
from typing import Any

from mfdist.errors import ConfigError


@functools.cache
def on_cpu(op: str) -> Any:
    """Return the module of an operator's numba kernels."""
    return importlib.import_module(f"mfdist.kernels.{op}.cpu_impl")


@functools.cache
def on_gpu(op: str) -> Any:
    """Return the module of an operator's Triton kernels.

    Raises:
        ConfigError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{op} on a GPU needs Triton, which is not installed; pip install triton, or use the CPU")
    return importlib.import_module(f"mfdist.kernels.{op}.triton_impl")

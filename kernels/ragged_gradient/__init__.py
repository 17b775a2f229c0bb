"""The gradients of lookups that are listed one by one."""

from mfdist.kernels.ragged_gradient.op import ragged_gradient

__all__ = ["ragged_gradient"]

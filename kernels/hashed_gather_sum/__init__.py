"""The lookup of activations, for inference: a norm, sign_hash, gather_sum and sums with its result in one."""

from mfdist.kernels.hashed_gather_sum.norm import Norm
from mfdist.kernels.hashed_gather_sum.op import hashed_gather_sum

__all__ = ["Norm", "hashed_gather_sum"]

"""The lookup of activations, for inference: sign_hash and gather_sum in one."""

from mfdist.kernels.hashed_gather_sum.op import hashed_gather_sum

__all__ = ["hashed_gather_sum"]

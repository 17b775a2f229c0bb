"""MemoryFormer's addressing: activations → codes and scores."""

from mfdist.kernels.sign_hash.op import sign_hash

__all__ = ["sign_hash"]

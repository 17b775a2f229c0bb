"""Attention of one new token a sequence over a cache, which it is written to: rotation included, for inference."""

from mfdist.kernels.one_token_attention.op import MAX_HEAD_WIDTH, one_token_attention

__all__ = ["MAX_HEAD_WIDTH", "one_token_attention"]

"""Random caches and projections of one more token, and what attention gives for them by numpy in float64."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


class Attention(NamedTuple):
    """Arguments of one_token_attention."""

    qkv: Tensor
    cosine: Tensor
    sine: Tensor
    keys: Tensor
    values: Tensor
    length: int
    residual: Tensor | None


class Expected(NamedTuple):
    """The result, and the cache up to the new token."""

    out: Array
    keys: Array
    values: Array


def make_attention(
    num_sequences: int,
    num_heads: int,
    length: int,
    head_dim: int,
    half: int,
    dtype: torch.dtype,
    *,
    has_residual: bool = False,
    has_own_angles: bool = True,
    device: str = "cpu",
) -> Attention:
    """Return random arguments; what the cache has not been told is NaN."""
    cache = torch.full((2, num_sequences, num_heads, length + 3, head_dim), torch.nan)
    cache[..., :length, :] = torch.randn(2, num_sequences, num_heads, length, head_dim)
    angles = torch.randn(num_sequences if has_own_angles else 1, 1, 1, half)
    width = num_heads * head_dim
    qkv, residual = torch.randn(num_sequences, 1, 3 * width), torch.randn(num_sequences, 1, width)
    qkv, cache, residual = (each.to(device, dtype) for each in (qkv, cache, residual))
    angles = angles.to(device, torch.promote_types(dtype, torch.float32))
    return Attention(qkv, angles.cos(), angles.sin(), cache[0], cache[1], length, residual if has_residual else None)


def expected_attention(made: Attention) -> Expected:
    """Return what it gives; the new key is rounded as the cache has it."""
    num_sequences, num_heads, _, head_dim = made.keys.shape
    query, key, value = (
        each.reshape(num_sequences, num_heads, head_dim) for each in np.split(_numpy(made.qkv)[:, 0], 3, axis=-1)
    )
    query, key = (_rotated(each, _numpy(made.cosine), _numpy(made.sine)) for each in (query, key))
    query, key = (_numpy(torch.from_numpy(each).to(made.qkv.dtype)) for each in (query, key))
    seen = slice(made.length)
    keys = np.concatenate([_numpy(made.keys)[:, :, seen], key[:, :, None]], axis=2)
    values = np.concatenate([_numpy(made.values)[:, :, seen], value[:, :, None]], axis=2)
    scores = (keys @ query[..., None])[..., 0] / np.sqrt(head_dim)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = (shares[:, :, None] @ values).reshape(num_sequences, 1, num_heads * head_dim)
    return Expected(out if made.residual is None else out + _numpy(made.residual), keys, values)


def _rotated(heads: Array, cosine: Array, sine: Array) -> Array:
    half = cosine.shape[-1]
    turned = heads.copy()
    pairs = (heads[..., :half] + 1j * heads[..., half : 2 * half]) * (cosine + 1j * sine)[:, 0]
    turned[..., :half], turned[..., half : 2 * half] = pairs.real, pairs.imag
    return turned


def _numpy(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()

"""What one_token_attention computes, in plain torch."""

import torch
from torch import Tensor


def one_token_attention(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Return [B, 1, H·E] in qkv's dtype, computed in it, and fill position `length` of the cache."""
    num_sequences, num_heads, _, head_dim = keys.shape
    query, key, value = qkv.view(num_sequences, 3, num_heads, head_dim).unbind(1)
    query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
    keys[:, :, length], values[:, :, length] = key, value
    weights = torch.einsum("bhe,bhse->bhs", query, keys[:, :, : length + 1]) * head_dim**-0.5
    heads = torch.einsum("bhs,bhse->bhe", weights.softmax(-1), values[:, :, : length + 1])
    out = heads.reshape(num_sequences, 1, num_heads * head_dim)
    return out if residual is None else out + residual


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of each head's leading columns; heads [B, H, E], angles [B or 1, 1, 1, half]."""
    half = cosine.shape[-1]
    cosine, sine = (each[:, 0].to(heads.dtype) for each in (cosine, sine))
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)

"""Causal multi-head attention over projections made elsewhere, with rotary positions and a key-value cache.

Shape letters: B sequences, T new tokens, S tokens so far, H heads, E head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mfdist.errors import ConfigError

ROTARY_BASE = 10_000.0


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far in one layer; `append` fills it in place.

    Args:
        keys, values: [B, H, capacity, E].
        length: tokens filled.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T more tokens and return views of all S keys and values.

        Raises:
            ConfigError: the cache is full; nothing was stored.
        """
        end = self.length + key.shape[2]
        if end > self.keys.shape[2]:
            raise ConfigError(f"the sequence must fit the cache; got {end} tokens, capacity {self.keys.shape[2]}")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def attend(qkv: Tensor, num_heads: int, rotary_dim: int, cache: KeyValueCache | None = None) -> Tensor:
    """Return causal attention of the packed projections, heads concatenated.

    Args:
        qkv: [B, T, 3·H·E], queries, keys and values one after another.
        num_heads: H.
        rotary_dim: leading columns of each head that are rotated by position; even, 0 rotates none.
        cache: earlier keys and values; the T tokens follow them and are added to it.

    Returns:
        [B, T, H·E] in qkv's dtype.
    """
    num_sequences, num_new, width = qkv.shape
    heads = qkv.view(num_sequences, num_new, 3, num_heads, width // (3 * num_heads))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    first = 0 if cache is None else cache.length
    if rotary_dim:
        cosine, sine = _rotation(first, num_new, rotary_dim, qkv)
        query, key = (_rotate(part, cosine, sine) for part in (query, key))
    if cache is not None:
        key, value = cache.append(key, value)
    mask = None
    if first and num_new > 1:
        mask = torch.ones(num_new, first + num_new, dtype=torch.bool, device=qkv.device).tril(first)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=first == 0 and num_new > 1)
    return out.transpose(1, 2).reshape(num_sequences, num_new, width // 3)


def _rotation(first: int, num_new: int, rotary_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, rotary_dim, 2, device=like.device, dtype=dtype) / rotary_dim
    position = torch.arange(first, first + num_new, device=like.device, dtype=dtype)
    angle = position[:, None] * (ROTARY_BASE**-exponent)[None, :]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs (i, i + rotary_dim/2) of each head's leading columns, GPT-NeoX's pairing."""
    half = cosine.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)

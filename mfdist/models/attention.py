"""Causal multi-head attention over projections made elsewhere, with rotary positions and a key-value cache.

Shape letters: B sequences, T new tokens, S tokens so far, H heads, E head width.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mfdist.errors import ConfigError
from mfdist.kernels import MAX_HEAD_WIDTH, one_token_attention

ROTARY_BASE = 10_000.0
#: Heads wider than this, over more tokens than that, are faster by torch's attention; measured on an H200.
_WIDE_HEAD = 128
_FEW_OF_WIDE = 128

torch.library.define(
    "mfdist::rotation", "(Tensor positions, int rotary_dim, ScalarType dtype) -> (Tensor cosine, Tensor sine)"
)


class KeyValueStore(Protocol):
    """What attention asks of a cache: one layer's keys and values, to which those of new tokens are added."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, T, E] of new tokens and return those of all tokens, [B, H, S, E]."""


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
        first = self.reserve(key.shape[2])
        end = self.length
        self.keys[:, :, first:end] = key
        self.values[:, :, first:end] = value
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, num_new: int) -> int:
        """Count more tokens, for the caller to store, and return the position of the first.

        Raises:
            ConfigError: the cache is full; nothing was counted.
        """
        first, end = self.length, self.length + num_new
        if end > self.keys.shape[2]:
            raise ConfigError(f"the sequence must fit the cache; got {end} tokens, capacity {self.keys.shape[2]}")
        self.length = end
        return first


class Placement(NamedTuple):
    """Where the new tokens stand and what each may look at; the same in all layers, so made once."""

    #: Of their rotation, [B or 1, 1, T, rotary_dim / 2]; fp32, or fp64 where the model is.
    cosine: Tensor
    sine: Tensor
    #: [B or 1, 1, T, S], True where a token may look; None: at all up to itself, which are the S - T before it and T.
    mask: Tensor | None
    #: Whether a mask of None has to be made up for: the new tokens are all there are.
    is_causal: bool


def place(
    positions: Tensor, rotary_dim: int, dtype: torch.dtype, *, seen: int = 0, mask: Tensor | None = None
) -> Placement:
    """Return the placement of new tokens.

    Args:
        positions: [T] or [B, T], of each token in its sequence.
        rotary_dim: leading columns of each head that are rotated by position; even, 0 rotates none.
        dtype: the model's.
        seen: tokens before the new ones, where no mask says what may be looked at.
        mask: [B or 1, 1, T, S] bool, which of all tokens each new one may look at; each must see one at least.
    """
    num_new = positions.shape[-1]
    if mask is None and seen and num_new > 1:
        mask = torch.ones(num_new, seen + num_new, dtype=torch.bool, device=positions.device).tril(seen)[None, None]
    # As an operator, which the compiler leaves as it is: it would take powers and cosines anew for every head's element
    # in every layer. For one token that is the faster way.
    rotation = _rotation if num_new == 1 else torch.ops.mfdist.rotation.default
    cosine, sine = rotation(positions, rotary_dim, torch.promote_types(dtype, torch.float32))
    return Placement(cosine, sine, mask, is_causal=mask is None and seen == 0)


def _rotation(positions: Tensor, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of all angles, [B or 1, 1, T, rotary_dim / 2], in `dtype`."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=dtype) / max(1, rotary_dim)
    angle = positions.to(dtype).view(-1, 1, positions.shape[-1], 1) * ROTARY_BASE**-exponent
    return angle.cos(), angle.sin()


def _shapes_of(positions: Tensor, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_new = positions.shape[-1]
    made = positions.new_empty((positions.numel() // num_new, 1, num_new, rotary_dim // 2), dtype=dtype)
    return made, torch.empty_like(made)


torch.library.impl("mfdist::rotation", "CompositeExplicitAutograd", _rotation)
torch.library.register_fake("mfdist::rotation", _shapes_of)


def attend(
    qkv: Tensor,
    num_heads: int,
    placement: Placement,
    cache: KeyValueStore | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Return causal attention of the packed projections, heads concatenated, plus a residual where one is given.

    Args:
        qkv: [B, T, 3·H·E], queries, keys and values one after another.
        num_heads: H.
        placement: of the T tokens.
        cache: earlier keys and values; the T tokens follow them and are added to it.
        residual: [B, T, H·E].

    Returns:
        [B, T, H·E] in qkv's dtype, or in the residual's where that is wider.
    """
    if qkv.shape[1] == 1 and isinstance(cache, KeyValueCache) and _is_one_kernel(qkv, placement, cache, residual):
        first = cache.reserve(1)
        return one_token_attention(qkv, placement.cosine, placement.sine, cache.keys, cache.values, first, residual)
    num_sequences, num_new, width = qkv.shape
    heads = qkv.view(num_sequences, num_new, 3, num_heads, width // (3 * num_heads))
    query, key, value = heads = heads.permute(2, 0, 3, 1, 4)
    if placement.cosine.shape[-1]:
        # Together: for one token on a CPU it is the number of calls that takes the time.
        query, key = _rotate(heads[:2], placement.cosine.to(qkv.dtype), placement.sine.to(qkv.dtype))
    if cache is not None:
        key, value = cache.append(key, value)
    out = scaled_dot_product_attention(query, key, value, attn_mask=placement.mask, is_causal=placement.is_causal)
    out = out.transpose(1, 2).reshape(num_sequences, num_new, width // 3)
    return out if residual is None else residual + out


def _is_one_kernel(qkv: Tensor, placement: Placement, cache: KeyValueCache, residual: Tensor | None) -> bool:
    """Return whether there is one for a token that may look at everything before it: on a GPU, for inference."""
    if not qkv.is_cuda or torch.is_grad_enabled() or placement.mask is not None:
        return False
    if not cache.keys.is_contiguous() or not cache.values.is_contiguous():
        return False
    if cache.keys.shape[3] > (MAX_HEAD_WIDTH if cache.length < _FEW_OF_WIDE else _WIDE_HEAD):
        return False
    return qkv.dtype != torch.float64 and all(
        each is None or each.dtype == qkv.dtype for each in (cache.keys, residual)
    )


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs (i, i + rotary_dim/2) of each head's leading columns, GPT-NeoX's pairing."""
    half = cosine.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)

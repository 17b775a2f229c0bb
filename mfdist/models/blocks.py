"""The two kinds of transformer block: MemoryFormer's, and the dense one of its Pythia-shaped twin.

Both take the residual stream [B, T, d] and return it; everything around them is the same code, so that a comparison
of the two compares the projections.
"""

import math

import torch
from torch import Tensor, nn

from mfdist.config import ModelConfig
from mfdist.layers import MemoryLayer
from mfdist.models.attention import KeyValueStore, Placement, attend
from mfdist.models.normed_lookup import normed_lookup

FEED_FORWARD_STD = 0.02


def rotary_dim(config: ModelConfig) -> int:
    """Return the leading columns of each head that are rotated by position, an even number."""
    return 2 * int(config.rotary_fraction * config.hidden_dim / config.num_heads / 2)


class Block(nn.Module):
    """What both kinds share: the shape and the attention between the projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rotary_dim = rotary_dim(config)

    def forward(self, x: Tensor, placement: Placement, cache: KeyValueStore | None = None) -> Tensor:
        """Return the residual stream [B, T, d] after this block; `cache` holds the block's earlier tokens."""
        raise NotImplementedError


class MemoryBlock(Block):
    """MemoryFormer's block: no matrix product but attention's own.

    a = Attention(MemoryLayer_qkv(RMSNorm(x))), one hash and one lookup of rows 3·d wide for Q, K and V;
    z = x + a; y = z + M2(LayerNorm(M1(RMSNorm(z)))), M1 widening to (bits + extra_bits)·K; no activation,
    but GELU on M1's output where the configuration asks for it.

    Source: MemoryFormer (arXiv 2411.12992), equation 13 and the released code.
    """

    def __init__(
        self, config: ModelConfig, name: str = "block", *, table_device: torch.device | str | None = None
    ) -> None:
        super().__init__(config)
        d, bits = config.hidden_dim, config.bits
        wide_bits = bits + config.extra_bits
        wide_dim = d // bits * wide_bits

        def layer(in_features: int, out_features: int, bits: int, part: str, std: float) -> MemoryLayer:
            return MemoryLayer(
                in_features,
                out_features,
                bits,
                config.score,
                temperature=config.score_temperature,
                name=f"{name}.{part}",
                std=config.init_scale * std,
                table_device=table_device,
                table_dtype=torch.bfloat16 if config.table_dtype == "bf16" else None,
            )

        self.attention_norm = nn.RMSNorm(d, eps=1e-5)
        self.qkv = layer(d, 3 * d, bits, "qkv", math.sqrt(2 / (5 * d)))
        self.ffn1_norm = nn.RMSNorm(d, eps=1e-5)
        self.ffn1 = layer(d, wide_dim, bits, "ffn1", FEED_FORWARD_STD)
        self.has_gelu = config.activation == "gelu"
        self.ffn2_norm = nn.LayerNorm(wide_dim, eps=1e-5)
        self.ffn2 = layer(wide_dim, d, wide_bits, "ffn2", FEED_FORWARD_STD)

    def forward(self, x: Tensor, placement: Placement, cache: KeyValueStore | None = None) -> Tensor:
        """Return the residual stream after this block; see `Block.forward`."""
        qkv = normed_lookup(self.attention_norm, self.qkv, x)
        x = attend(qkv, self.num_heads, placement, cache, residual=x)
        wide = normed_lookup(self.ffn1_norm, self.ffn1, x)
        return normed_lookup(self.ffn2_norm, self.ffn2, nn.functional.gelu(wide) if self.has_gelu else wide, residual=x)


class DenseBlock(Block):
    """The twin's block, Pythia's: attention and a GELU feed-forward of width 4·d side by side.

    y = x + Linear(Attention(Linear_qkv(LayerNorm(x)))) + Linear(GELU(Linear(LayerNorm(x)))); GPT-NeoX's start values.
    """

    def __init__(
        self, config: ModelConfig, name: str = "block", *, table_device: torch.device | str | None = None
    ) -> None:
        super().__init__(config)
        d = config.hidden_dim
        self.attention_norm = nn.LayerNorm(d, eps=1e-5)
        self.qkv = nn.Linear(d, 3 * d)
        self.projection = nn.Linear(d, d)
        self.ffn_norm = nn.LayerNorm(d, eps=1e-5)
        self.ffn1 = nn.Linear(d, 4 * d)
        self.ffn2 = nn.Linear(4 * d, d)
        inner_std, outer_std = math.sqrt(2 / (5 * d)), 2 / (config.num_layers * math.sqrt(d))
        for linear, std in (
            (self.qkv, inner_std),
            (self.ffn1, inner_std),
            (self.projection, outer_std),
            (self.ffn2, outer_std),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, placement: Placement, cache: KeyValueStore | None = None) -> Tensor:
        """Return the residual stream after this block; see `Block.forward`."""
        attention = self.projection(attend(self.qkv(self.attention_norm(x)), self.num_heads, placement, cache))
        out: Tensor = x + attention + self.ffn2(nn.functional.gelu(self.ffn1(self.ffn_norm(x))))
        return out

"""The language model around the blocks: embedding, blocks, norm, classifier head.

Shape letters: B sequences, T tokens, d hidden_dim, V vocab_size.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError
from mfdist.kernels import row_products
from mfdist.models.attention import KeyValueCache, KeyValueStore, place
from mfdist.models.blocks import DenseBlock, MemoryBlock, rotary_dim
from mfdist.table import autocast_dtype


class Transformer(nn.Module):
    """A causal language model whose `config.kind` chooses the blocks; made by `build_model` or by a subclass.

    Args:
        config: the shape; `vocab_size` must be set.
        device: where parameters are made; `meta` makes none, to count or to load into.
        table_device: of the tables, where it differs; `meta` leaves their rows to `mfdist.shard`.

    Raises:
        ConfigError: `vocab_size` is 0, or the kind is not this class's.
    """

    kind: ClassVar[str]
    block: ClassVar[type[MemoryBlock] | type[DenseBlock]]
    final_norm: ClassVar[type[nn.RMSNorm] | type[nn.LayerNorm]]

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        table_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.kind != self.kind:
            raise ConfigError(f'{type(self).__name__} is of kind "{self.kind}"; got model.kind="{config.kind}"')
        if not config.vocab_size:
            raise ConfigError("model.vocab_size must be set to build a model; a run takes it from its tokenizer")
        self.config = config
        with torch.device(device if device is not None else torch.get_default_device()):
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_dim)
            self.blocks = nn.ModuleList(
                self.block(config, f"blocks.{index}", table_device=table_device) for index in range(config.num_layers)
            )
            self.norm = self.final_norm(config.hidden_dim, eps=1e-5)
            self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
            for weight in (self.embedding.weight, self.head.weight):
                nn.init.normal_(weight, std=math.sqrt(2 / (5 * config.hidden_dim)))

    def forward(self, tokens: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            tokens: [B, T], int64 in [0, V); T at most `config.max_seq_len`, cached tokens included.
            caches: from `new_caches`, to go on from the tokens they hold; they are extended in place.

        Returns:
            [B, T, V], in autocast's dtype where that is on.
        """
        logits: Tensor = self.head(self._following(tokens, caches))
        return logits

    def next_logits(self, tokens: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Return the logits after the last token alone, [B, V]; see `forward`."""
        last, weight = self._following(tokens, caches)[:, -1], self.head.weight
        is_plain = type(weight) is nn.Parameter and autocast_dtype(last.device) is None and last.dtype == weight.dtype
        if last.device.type == "cpu" and len(last) == 1 and is_plain and not torch.is_grad_enabled():
            return row_products(weight, last[0])[None]
        logits: Tensor = self.head(last)
        return logits

    def features(
        self,
        tokens: Tensor,
        positions: Tensor,
        caches: Sequence[KeyValueStore] | None = None,
        *,
        seen: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return what the classifier head reads: [B, T, d], after the last norm.

        Args:
            tokens: [B, T], int64 in [0, V).
            positions: [T] or [B, T], of each token in its sequence.
            caches: one a block, of earlier tokens; extended.
            seen: how many tokens those hold, where no mask says what may be looked at.
            mask: see `mfdist.models.attention.place`.
        """
        x = self.embedding(tokens)
        placement = place(positions, rotary_dim(self.config), x.dtype, seen=seen, mask=mask)
        for index, block in enumerate(self.blocks):
            x = block(x, placement, caches[index] if caches else None)
        out: Tensor = self.norm(x)
        return out

    def _following(self, tokens: Tensor, caches: Sequence[KeyValueCache] | None) -> Tensor:
        """Return the features of tokens that follow those in the caches."""
        seen = caches[0].length if caches else 0
        num_tokens = seen + tokens.shape[1]
        if num_tokens > self.config.max_seq_len:
            raise ConfigError(
                f"a sequence must have at most max_seq_len={self.config.max_seq_len} tokens; got {num_tokens}"
            )
        return self.features(tokens, torch.arange(seen, num_tokens, device=tokens.device), caches, seen=seen)

    def new_caches(self, num_sequences: int, capacity: int) -> list[KeyValueCache]:
        """Return empty caches, one a block, for `num_sequences` sequences of at most `capacity` tokens."""
        weight = self.embedding.weight
        dtype = autocast_dtype(weight.device) or weight.dtype
        head_dim = self.config.hidden_dim // self.config.num_heads
        shape = (num_sequences, self.config.num_heads, capacity, head_dim)
        return [
            KeyValueCache(
                keys=torch.empty(shape, dtype=dtype, device=weight.device),
                values=torch.empty(shape, dtype=dtype, device=weight.device),
            )
            for _ in self.blocks
        ]


class MemoryFormer(Transformer):
    """The MemoryFormer: projections are memory layers, the classifier head is the only matrix.

    Source: MemoryFormer (arXiv 2411.12992), section 2.4; rotary positions and untied embeddings as released.
    """

    kind = "memory"
    block = MemoryBlock
    final_norm = nn.RMSNorm


class DenseTransformer(Transformer):
    """The dense twin: Pythia's blocks in the same frame, to compare a MemoryFormer with."""

    kind = "dense"
    block = DenseBlock
    final_norm = nn.LayerNorm


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str | None = None,
    table_device: torch.device | str | None = None,
) -> Transformer:
    """Return a freshly initialised model of `config.kind`; seed torch's generator first for repeatable weights."""
    kinds: tuple[type[Transformer], ...] = (MemoryFormer, DenseTransformer)
    return next(kind for kind in kinds if kind.kind == config.kind)(config, device=device, table_device=table_device)

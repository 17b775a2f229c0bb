"""MemoryFormer as a causal language model of `transformers`: loading, saving, `generate`, its cache and its masks.

The model is `mfdist.models.MemoryFormer`; what is here speaks for it. Importing this makes `AutoConfig` and
`AutoModelForCausalLM` know it.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mfdist.hugging_face.configuration import MemoryFormerConfig
from mfdist.hugging_face.library import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    CausalLMOutputWithPast,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    create_causal_mask,
)
from mfdist.layers import MemoryLayer
from mfdist.models import MemoryFormer
from mfdist.tables.local import LocalTable

__all__ = ["MemoryFormerConfig", "MemoryFormerForCausalLM"]


class MemoryFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """A MemoryFormer with what `transformers` expects of a model; its parameters are those of `model`.

    Args:
        config: the shape.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    config: MemoryFormerConfig
    config_class = MemoryFormerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ("MemoryBlock",)
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__(config)
        self.model = MemoryFormer(config.shape)
        for module in self.modules():
            # They have drawn their own values. On the meta device there are none: what a folder lacks is drawn later.
            module._is_hf_initialized = not self.model.embedding.weight.is_meta
        self.post_init()

    @classmethod
    def of(cls, model: MemoryFormer, **fields: Any) -> Self:
        """Return a model of `transformers` that holds this one; `fields` are of its configuration besides the shape."""
        with torch.device("meta"):
            made = cls(MemoryFormerConfig.of(model.config, **fields))
        made.model = model
        made.train(model.training)
        return made

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the next token's logits, and the loss where labels are given.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B, S], 0 for padding, of the cached tokens and the T new ones.
            position_ids: [B, T]; by default counted, padding apart.
            cache: keys and values of earlier tokens; extended.
            labels: [B, T], the same tokens; -100 is left out of the loss.
            use_cache: whether to make a cache where none is given; by default the configuration's, and not in training.
            logits_to_keep: logits of so many last positions alone, or of these positions; 0: of all.
            return_dict: False gives a tuple.
            more: for the loss; the old name of `cache`, `past_key_values`, is understood.
        """
        cache = more.pop("past_key_values", None) if cache is None else cache
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        num_new, seen = input_ids.shape[1], 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = _positions(attention_mask, seen, num_new, input_ids.device)
        like = self.model.embedding.weight.new_empty(*input_ids.shape, 0)  # shape, dtype and device are all it is for
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=like,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
            # With tokens before the new ones, "causal" is not the lower left triangle of what attention sees.
            allow_is_causal_skip=cache is None or not cache.is_compileable,
        )
        stores = None if cache is None else _stores(cache, self.config.num_hidden_layers)
        features = self.model.features(input_ids, position_ids, stores, seen=0 if mask is not None else seen, mask=mask)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(features[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **more)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return out.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else out

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take another embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the classifier head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take another classifier head."""
        self.model.head = new_embeddings

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: folders name this package instead of carrying a copy of its code."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a folder lacked; `transformers` names it in a warning."""
        if isinstance(module, nn.Embedding | nn.Linear):
            module.weight.normal_(0.0, math.sqrt(2 / (5 * self.config.hidden_size)))
        elif isinstance(module, MemoryLayer | LocalTable | nn.RMSNorm | nn.LayerNorm):
            module.reset_parameters()


class _LayerStore:
    """One layer of a cache of `transformers`, as attention takes it."""

    def __init__(self, cache: Cache, index: int) -> None:
        self._cache = cache
        self._index = index

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all of them."""
        updated: tuple[Tensor, Tensor] = self._cache.update(key, value, self._index)
        return updated


def _stores(cache: Cache, num_layers: int) -> Sequence[_LayerStore]:
    return [_LayerStore(cache, index) for index in range(num_layers)]


def _positions(attention_mask: Tensor | None, seen: Any, num_new: int, device: torch.device) -> Tensor:
    """Return [T] or [B, T], what is padding not being counted."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(num_new, device=device).add(seen)
    counted: Tensor = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_new:]
    return counted


AutoConfig.register(MemoryFormerConfig.model_type, MemoryFormerConfig)
AutoModelForCausalLM.register(MemoryFormerConfig, MemoryFormerForCausalLM)

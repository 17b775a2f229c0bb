"""MemoryFormer's shape as a configuration of `transformers`."""

import os
from pathlib import Path
from typing import Any

from mfdist.config import ModelConfig
from mfdist.hugging_face import memoryformer_format as form
from mfdist.hugging_face.library import PreTrainedConfig


class MemoryFormerConfig(PreTrainedConfig):
    """The shape of a `MemoryFormerForCausalLM`; sizes have Hugging Face's usual names.

    Args:
        vocab_size: tokens.
        hidden_size: width d of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: must divide hidden_size.
        max_position_embeddings: longest sequence, in tokens.
        bits: sign bits a chunk (τ); must divide hidden_size.
        extra_bits: more of them in the second feed-forward layer's chunks.
        activation: `none`, or `gelu` between the feed-forward layers.
        score: `paper` or `released`, the weight of a row.
        score_temperature: t of the score.
        init_scale: standard deviation of new rows, as a multiple of the paper's.
        rotary_fraction: share of each head that is rotated by position.
        table_dtype: what rows are kept in, `fp32` or `bf16`.
    """

    model_type = form.MODEL_TYPE
    keys_to_ignore_at_inference = ("cache",)

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    max_position_embeddings: int = 2048
    bits: int = 8
    extra_bits: int = 2
    activation: str = "none"
    score: str = "paper"
    score_temperature: float = 1.0
    init_scale: float = 1.0
    rotary_fraction: float = 0.25
    table_dtype: str = "fp32"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **given: Any) -> None:
        """Name the classes that load it, for `trust_remote_code`."""
        super().__post_init__(**{**given, "auto_map": form.AUTO_MAP})

    @classmethod
    def of(cls, shape: ModelConfig, **more: Any) -> "MemoryFormerConfig":
        """Return the configuration of one of mfdist's shapes."""
        return cls(**form.fields_of(shape), **more)

    @property
    def shape(self) -> ModelConfig:
        """Return the shape as mfdist has it.

        Raises:
            ConfigError: sizes that do not fit together.
        """
        return form.shape_of(self.to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Write config.json, and beside it the file of code that finds these classes."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / form.CODE_FILE).write_text(form.CODE, "utf-8")
        return saved

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: folders name this package instead of carrying a copy of its code."""

"""How a MemoryFormer is written down for Hugging Face: the fields of config.json, the names of its tensors. Pure.

Sizes carry the names that other libraries look for; what only a MemoryFormer has keeps its own.
"""

from collections.abc import Mapping
from typing import Any

from mfdist.config import ModelConfig
from mfdist.hugging_face.fields import model_config

MODEL_TYPE = "memoryformer"

#: The module that the folder's own file of code imports, so that `trust_remote_code=True` finds the classes.
CODE_FILE = "mfdist_memoryformer.py"
CODE = '''"""Loads MemoryFormer from the package mfdist: pip install mfdist[transformers]."""

from mfdist.hugging_face import MemoryFormerConfig, MemoryFormerForCausalLM

__all__ = ["MemoryFormerConfig", "MemoryFormerForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": "mfdist_memoryformer.MemoryFormerConfig",
    "AutoModelForCausalLM": "mfdist_memoryformer.MemoryFormerForCausalLM",
}

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_seq_len",
    "bits": "bits",
    "extra_bits": "extra_bits",
    "activation": "activation",
    "score": "score",
    "score_temperature": "score_temperature",
    "init_scale": "init_scale",
    "rotary_fraction": "rotary_fraction",
    "table_dtype": "table_dtype",
}
_PREFIX = "model."


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json says of a MemoryFormer's shape."""
    return {field: getattr(config, own) for field, own in _FIELDS.items()}


def shape_of(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the shape that config.json describes.

    Raises:
        ConfigError: a field is missing or wrong.
    """
    return model_config("memory", {own: fields[field] for field, own in _FIELDS.items() if field in fields})


def described(config: ModelConfig) -> dict[str, Any]:
    """Return the whole config.json, but for the tokenizer's fields."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MemoryFormerForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "tie_word_embeddings": False,
        **fields_of(config),
    }


def published_name(name: str) -> str:
    """Return what one of the model's parameters is called in the folder."""
    return _PREFIX + name


def own_name(name: str) -> str:
    """Return which of the model's parameters a tensor of the folder is."""
    return name.removeprefix(_PREFIX)

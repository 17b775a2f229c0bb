"""The dense twin as GPT-NeoX, the format of Pythia's checkpoints: fields of config.json, names and order of tensors.

Pure. The twin computes what GPT-NeoX does with Pythia's settings; what it has no switch for must have their value.
GPT-NeoX packs queries, keys and values by heads, [H, 3, E], where the twin has [3, H, E]; all else is the same tensor.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError
from mfdist.hugging_face.fields import model_config
from mfdist.models.attention import ROTARY_BASE

MODEL_TYPE = "gpt_neox"

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_seq_len",
}
#: Field → the values under which GPT-NeoX computes what the twin does, the first being GPT-NeoX's default.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-5,),
    "use_parallel_residual": (True,),
    "attention_bias": (True,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}
#: Ours → GPT-NeoX's, of a block and around the blocks.
_INNER = {
    "attention_norm": "input_layernorm",
    "qkv": "attention.query_key_value",
    "projection": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn1": "mlp.dense_h_to_4h",
    "ffn2": "mlp.dense_4h_to_h",
}
_OUTER = {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"}
_ALSO = {"lm_head": "head"}  # what newer versions of transformers call it

#: Buffers that old checkpoints hold: masks and frequencies, which follow from the shape.
_BUFFERS = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^gpt_neox\.rotary_emb\.")


def described(config: ModelConfig) -> dict[str, Any]:
    """Return the whole config.json of a dense twin, but for the tokenizer's fields."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GPTNeoXForCausalLM"],
        "dtype": "float32",
        **{field: getattr(config, own) for field, own in _SIZES.items()},
        "intermediate_size": 4 * config.hidden_dim,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": ROTARY_BASE,
        **{field: values[0] for field, values in _FIXED.items()},
    }


def shape_of(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the dense twin's shape for a GPT-NeoX config.json.

    Raises:
        ConfigError: a field is missing, or asks for what the twin does not compute; the message names it.
    """
    rope = dict(fields.get("rope_parameters") or {})
    rotary_fraction = rope.get("partial_rotary_factor", fields.get("rotary_pct", 0.25))
    config = model_config(
        "dense",
        {own: fields[field] for field, own in _SIZES.items() if field in fields} | {"rotary_fraction": rotary_fraction},
    )
    asked = {
        "rope_parameters.rope_type": rope.get("rope_type", "default"),
        "rotary_emb_base": rope.get("rope_theta", fields.get("rotary_emb_base", ROTARY_BASE)),
        "intermediate_size": fields.get("intermediate_size", 4 * config.hidden_dim),
        **{field: fields.get(field, values[0]) for field, values in _FIXED.items()},
    }
    computed = {
        "rope_parameters.rope_type": ("default",),
        "rotary_emb_base": (ROTARY_BASE,),
        "intermediate_size": (4 * config.hidden_dim,),
        **_FIXED,
    }
    for field, value in asked.items():
        if value not in computed[field]:
            raise ConfigError(
                f"the dense twin computes GPT-NeoX with {field}={computed[field][0]!r}, as all of Pythia has; "
                f"got {field}={value!r} in config.json"
            )
    return config


def published_name(name: str) -> str:
    """Return what GPT-NeoX calls one of the twin's parameters."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(weight|bias)", name):
        return f"gpt_neox.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"
    part, _, kind = name.rpartition(".")
    return f"{_OUTER[part]}.{kind}"


def own_name(name: str) -> str | None:
    """Return which of the twin's parameters a tensor is; None for a buffer that follows from the shape.

    Raises:
        ConfigError: GPT-NeoX has no such tensor.
    """
    if _BUFFERS.search(name):
        return None
    inner = {theirs: own for own, theirs in _INNER.items()}
    outer = {theirs: own for own, theirs in _OUTER.items()} | _ALSO
    part, _, kind = name.rpartition(".")
    if part in outer:
        return f"{outer[part]}.{kind}"
    match = re.fullmatch(r"gpt_neox\.layers\.(\d+)\.(.+)", part)
    if match is None or match[2] not in inner:
        raise ConfigError(f"a GPT-NeoX checkpoint must hold GPT-NeoX's tensors alone; got {name}")
    return f"blocks.{match[1]}.{inner[match[2]]}.{kind}"


def published_value(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Return one of the twin's parameters as GPT-NeoX lays it out; `name` is ours."""
    return _swapped(value, 3, config.num_heads) if _is_packed(name) else value


def own_value(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Return GPT-NeoX's tensor as the twin lays it out; `name` is ours."""
    return _swapped(value, config.num_heads, 3) if _is_packed(name) else value


def _is_packed(name: str) -> bool:
    return re.fullmatch(r"blocks\.\d+\.qkv\.(weight|bias)", name) is not None


def _swapped(value: Tensor, outer: int, inner: int) -> Tensor:
    """Return rows that count [outer, inner, E] counted [inner, outer, E]."""
    head_dim = value.shape[0] // (outer * inner)
    parts = value.view(outer, inner, head_dim, *value.shape[1:])
    return torch.transpose(parts, 0, 1).reshape(value.shape).contiguous()

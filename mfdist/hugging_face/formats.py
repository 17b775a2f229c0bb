"""The two formats of a model's folder, chosen by what config.json calls itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError
from mfdist.hugging_face import gpt_neox_format, memoryformer_format


@dataclass(frozen=True, kw_only=True)
class FolderFormat:
    """How a kind of model is written down; `name` is always the model's own name of a parameter."""

    model_type: str
    kind: str  # of mfdist's model
    shape_of: Callable[[Mapping[str, Any]], ModelConfig]
    described: Callable[[ModelConfig], dict[str, Any]]
    published_name: Callable[[str], str]
    own_name: Callable[[str], str | None]  # None: not a parameter, to be passed over
    published_value: Callable[[str, Tensor, ModelConfig], Tensor] = lambda name, value, config: value
    own_value: Callable[[str, Tensor, ModelConfig], Tensor] = lambda name, value, config: value
    #: Files of text that go along: name → content.
    files: Mapping[str, str]


_FORMATS = (
    FolderFormat(
        model_type=memoryformer_format.MODEL_TYPE,
        kind="memory",
        shape_of=memoryformer_format.shape_of,
        described=memoryformer_format.described,
        published_name=memoryformer_format.published_name,
        own_name=memoryformer_format.own_name,
        files={memoryformer_format.CODE_FILE: memoryformer_format.CODE},
    ),
    FolderFormat(
        model_type=gpt_neox_format.MODEL_TYPE,
        kind="dense",
        shape_of=gpt_neox_format.shape_of,
        described=gpt_neox_format.described,
        published_name=gpt_neox_format.published_name,
        own_name=gpt_neox_format.own_name,
        published_value=gpt_neox_format.published_value,
        own_value=gpt_neox_format.own_value,
        files={},
    ),
)


def format_of_kind(kind: str) -> FolderFormat:
    """Return the format that a kind of mfdist's models is written in."""
    return next(form for form in _FORMATS if form.kind == kind)


def format_of_fields(fields: Mapping[str, Any]) -> FolderFormat:
    """Return the format of a config.json.

    Raises:
        ConfigError: it is of a kind that mfdist has no model for.
    """
    for form in _FORMATS:
        if form.model_type == fields.get("model_type"):
            return form
    known = " or ".join(form.model_type for form in _FORMATS)
    raise ConfigError(f"a folder's config.json must have model_type {known}; got {fields.get('model_type')!r}")

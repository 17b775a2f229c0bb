"""A model's folder as mfdist's own model: tables stay in their files, mapped into memory, until a token reads a row."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfdist.checkpoint.safetensors_format import SafetensorsSource
from mfdist.errors import CheckpointError, ConfigError
from mfdist.hugging_face.formats import format_of_fields
from mfdist.models import Transformer, build_model
from mfdist.training.data.tokenizer import Tokenizer, load_tokenizer
from mfdist.training.optimizer import table_parameter_names


@dataclass(frozen=True)
class LoadedFolder:
    """A model for inference, and its tokenizer if the folder has one."""

    model: Transformer
    tokenizer: Tokenizer | None


def is_model_folder(path: Path) -> bool:
    """Say whether a folder is one of Hugging Face's kind; a run's has a config.toml."""
    return (path / "config.json").is_file()


def load_folder(path: Path | str, *, dtype: torch.dtype = torch.float32) -> LoadedFolder:
    """Return the model in a folder: a MemoryFormer, or a GPT-NeoX (Pythia) as the dense twin that computes the same.

    Args:
        path: a folder with config.json and model.safetensors, in one file or several.
        dtype: of everything but the tables, whose rows stay as they are stored.

    Returns:
        The model, in evaluation mode and without gradients, on the CPU. Its tables are the files' own memory: writing
        to them changes no file, and removing the files while it lives does no harm.

    Raises:
        ConfigError: it is a model of another kind, or its settings are not what mfdist computes.
        CheckpointError: a file or a tensor is missing, damaged or of the wrong shape.
    """
    folder = Path(path)
    fields = _fields(folder)
    form = format_of_fields(fields)
    config = form.shape_of(fields)
    model = build_model(config, device="meta")
    tables = table_parameter_names(model)
    wanted = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for published, value in SafetensorsSource(folder, stack).tensors():
            name = form.own_name(published)
            if name is None:
                continue
            if name not in wanted or value.shape != wanted[name].shape:
                expected = list(wanted[name].shape) if name in wanted else "nothing of that name"
                raise CheckpointError(
                    f"a folder must hold what its config.json describes; {published} is {list(value.shape)}, "
                    f"expected {expected}, in {folder}"
                )
            if name not in tables:
                value = form.own_value(name, value, config).to(dtype)
            found[name] = value
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(
            f"a folder must hold every parameter of its model; {form.published_name(missing[0])} and "
            f"{len(missing) - 1} more are not in {folder}; copy all its .safetensors files"
        )
    model.load_state_dict(found, assign=True)
    tokenizer = folder / "tokenizer.json"
    return LoadedFolder(model.eval().requires_grad_(False), load_tokenizer(tokenizer) if tokenizer.is_file() else None)


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"a model's folder must have a config.json; {folder} has none") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config.json must be readable JSON; got {error}, in {folder}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"config.json must be a JSON object; got {type(fields).__name__}, in {folder}")
    return fields

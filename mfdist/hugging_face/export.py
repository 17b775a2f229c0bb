"""From a run's checkpoint to a folder that `transformers` and its tools load: a file's worth in memory at a time."""

import json
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from mfdist.checkpoint.folder import AnyFolder
from mfdist.checkpoint.layout import parse_path
from mfdist.checkpoint.reader import read_whole
from mfdist.checkpoint.safetensors_format import write_safetensors
from mfdist.checkpoint.step_files import StepFiles, StoredArray
from mfdist.config import ModelConfig, parse_config
from mfdist.errors import CheckpointError, ConfigError
from mfdist.hugging_face.formats import FolderFormat, format_of_kind
from mfdist.models import build_model
from mfdist.training.data.tokenizer import Tokenizer
from mfdist.training.optimizer import table_parameter_names


def export_step(
    step: AnyFolder,
    target: Path,
    tokenizer: Tokenizer | None,
    *,
    tables: AnyFolder | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write a step of a run as a model's folder; return the names of the tensors.

    A MemoryFormer becomes a `MemoryFormerForCausalLM`, its dense twin a `GPTNeoXForCausalLM`.

    Args:
        step: a committed step that `mfdist train` saved.
        target: a folder that is not there yet, or is empty.
        tokenizer: the run's; without one the folder has none.
        tables: the step of the tables, where table servers saved it.
        max_file_bytes: about the size of a file, and the memory this takes.

    Raises:
        ConfigError: the target holds something.
        CheckpointError: the step is damaged, or no run's.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"an export goes to a new or empty folder; {target} holds something; choose another.")
    with ExitStack() as stack:
        opened = [stack.enter_context(StepFiles(place)) for place in (step, tables) if place is not None]
        text = opened[0].attributes().get("config")
        if not isinstance(text, str):
            raise CheckpointError(
                f"an export for transformers needs a run's checkpoint; {step} was not written by `mfdist train`; "
                "export it to safetensors"
            )
        config = parse_config(text, origin=str(step)).model
        form = format_of_kind(config.kind)
        found = _parameters(config, opened)
        target.mkdir(parents=True, exist_ok=True)
        own_names = {form.published_name(name): name for name in found}

        def read(names: Collection[str]) -> dict[str, Tensor]:
            values: dict[str, Tensor] = {}
            for files in opened:
                wanted = {name: found[own_names[name]] for name in names}
                mine = {name: array for name, (holder, array) in wanted.items() if holder is files}
                values |= read_whole(files, mine)
            return {name: form.published_value(own_names[name], values[name], config) for name in names}

        sizes = {
            form.published_name(name): array.grid.num_bytes(array.dtype.itemsize) for name, (_, array) in found.items()
        }
        write_safetensors(target, sizes, read, {"format": "pt"}, max_file_bytes)
        write_texts(target, config, form, tokenizer)
        return list(sizes)


def write_texts(target: Path, config: ModelConfig, form: FolderFormat, tokenizer: Tokenizer | None) -> None:
    """Write everything but the tensors: the configuration, how to generate, the tokenizer."""
    ends = {}
    if tokenizer is not None:
        # Documents follow one another with this token between them: it ends one and begins the next.
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_document)
        text, end = tokenizer.as_library_json()
        (target / "tokenizer.json").write_text(text, "utf-8")
        _write(target / "tokenizer_config.json", _tokenizer_fields(end, config.max_seq_len))
    _write(target / "generation_config.json", ends)
    _write(target / "config.json", form.described(config) | ends)
    for name, content in form.files.items():
        (target / name).write_text(content, "utf-8")


def _parameters(config: ModelConfig, opened: Collection[StepFiles]) -> dict[str, tuple[StepFiles, StoredArray]]:
    """Return where each of the model's parameters is stored, in the order of its modules."""
    model = build_model(config, device="meta")
    table_names = table_parameter_names(model)
    stored: dict[str, tuple[StepFiles, StoredArray]] = {}
    for files in opened:
        for path, array in files.arrays(files.manifest.arrays).items():
            table, name = parse_path(path)
            if table is None:
                stored[name.removeprefix("model/")] = files, array
            elif name == "weight":
                stored[next((own for own, called in table_names.items() if called == table), table)] = files, array
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in names if name not in stored]:
        raise CheckpointError(
            f"a run's checkpoint must hold all parameters of its model; {missing[0]} and {len(missing) - 1} more are "
            "not there"
        )
    return {name: stored[name] for name in names}


def _tokenizer_fields(end: str, max_seq_len: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _write(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")

"""Checkpoints to and from other libraries' formats.

Tensors go out under their paths in the store ("tables/blocks.0.qkv/weight", "dense/model/head.weight") and come back
from them; what was not exported by mfdist comes in under its own names.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfdist.checkpoint.dcp_format import read_dcp, write_dcp
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.folder import AnyFolder
from mfdist.checkpoint.layout import parse_path
from mfdist.checkpoint.reader import read_whole
from mfdist.checkpoint.safetensors_format import SafetensorsSource, write_safetensors
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.checkpoint.step_files import StepFiles
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import CheckpointError, ConfigError

FORMATS = ("safetensors", "dcp")

#: Under this name the run's attributes and the step travel in formats that hold tensors alone.
_ATTRIBUTES = "mfdist/attributes"


def export_step(
    step: AnyFolder, target: Path, form: str, *, has_states: bool = True, max_file_bytes: int = 5_000_000_000
) -> list[str]:
    """Write a committed step in another format; return the names of the tensors.

    Args:
        step: a committed step.
        target: a folder that is not there yet, or is empty.
        form: one of FORMATS.
        has_states: whether optimiser states go too; else tables' weights and the model's other parameters alone.
        max_file_bytes: of safetensors, about the size of a file, and the memory this takes. dcp takes all in memory.

    Raises:
        ConfigError: the target holds something, or the format lacks a dtype.
        CheckpointError: the step is damaged.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}; got {form}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"an export goes to a new or empty folder; {target} holds something; choose another.")
    with StepFiles(step) as files:
        stored = files.arrays([path for path in files.manifest.arrays if has_states or _is_weight(path)])
        about = json.dumps({"step": files.manifest.step, "attributes": files.attributes()})
        target.mkdir(parents=True, exist_ok=True)

        def read(names: Collection[str]) -> dict[str, Tensor]:
            return read_whole(files, {name: stored[name] for name in names})

        if form == "dcp":
            told = torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)
            write_dcp(target, {**read(stored), _ATTRIBUTES: told})
        else:
            sizes = {name: array.grid.num_bytes(array.dtype.itemsize) for name, array in stored.items()}
            write_safetensors(target, sizes, read, {"format": "pt", _ATTRIBUTES: about}, max_file_bytes)
        return list(stored)


def import_step(
    source: Path, directory: CheckpointDirectory, *, step: int | None = None, tables: Collection[str] = ()
) -> StepInfo:
    """Commit what another format holds as a step, beside those that are there.

    Args:
        source: a .safetensors file, a folder of them, or a torch.distributed.checkpoint folder, which is unpickled.
        directory: where the step is committed.
        step: its number; by default the one that was exported, else 0.
        tables: shell patterns of tensors to take as tables; a name ending in ".weight" loses it. What mfdist exported
            knows its tables itself.

    Raises:
        ConfigError: the step is there already, a table has not two dimensions, or a pattern fits nothing.
        CheckpointError: the source is neither, or damaged.
        UnavailableError: another writer holds the directory.
    """
    with ExitStack() as stack:
        found, told = _open(source, stack)
        tensors = dict(found)
        about = json.loads(told or bytes(tensors.pop(_ATTRIBUTES, torch.empty(0, dtype=torch.uint8)).tolist()) or "{}")
        number = about.get("step", 0) if step is None else step
        for pattern in tables:
            if not any(fnmatchcase(name, pattern) for name in tensors):
                raise ConfigError(f"--table must name tensors of {source}; {pattern} fits none of {_some(tensors)}.")
        arrays, dense = _sorted_out(tensors, tables)
        state = CheckpointState(
            step=number,
            tables={name: TableState(weight=own.pop("weight"), optimizer=own) for name, own in arrays.items()},
            dense=dense,
            attributes=about.get("attributes", {}),
        )
        stack.enter_context(directory.writer_lock())  # nobody commits the step between the look and the save
        if number in directory.series.revisions():  # a save would supersede it, and it may hold more
            raise ConfigError(
                f"an import must not replace a step; step {number} is there already, in {directory.path}; "
                "give --step or another folder"
            )
        return directory.save(state)


def _sorted_out(
    tensors: Mapping[str, Tensor], tables: Collection[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    arrays: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("tables/") and name.count("/") == 2:
            table, array = parse_path(name)
            arrays.setdefault(str(table), {})[array] = tensor
        elif name.startswith("dense/"):
            dense[parse_path(name)[1]] = tensor
        elif any(fnmatchcase(name, pattern) for pattern in tables):
            arrays.setdefault(name.removesuffix(".weight"), {})["weight"] = tensor
        else:
            dense[name] = tensor
    for table, own in arrays.items():
        if "weight" not in own:
            raise CheckpointError(f"a table must have a weight; the states of {table!r} came without.")
    return arrays, dense


def _open(source: Path, stack: ExitStack) -> tuple[Iterator[tuple[str, Tensor]], str]:
    if (source / ".metadata").is_file():
        return read_dcp(source), ""
    if source.suffix == ".safetensors" or (source.is_dir() and any(source.glob("*.safetensors"))):
        opened = SafetensorsSource(source, stack)
        return opened.tensors(), opened.metadata.get(_ATTRIBUTES, "")
    raise CheckpointError(
        f"an import must be a .safetensors file, a folder of them, or a torch.distributed.checkpoint; {source} is none."
    )


def _is_weight(path: str) -> bool:
    table, name = parse_path(path)
    return name == "weight" if table is not None else name.startswith("model/")


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

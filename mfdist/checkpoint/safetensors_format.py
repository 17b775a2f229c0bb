"""The only file that imports safetensors: tensors to and from one file, or several with an index."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from mfdist.checkpoint.durability import fsync
from mfdist.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"


def write_safetensors(
    folder: Path,
    num_bytes: Mapping[str, int],
    read: Callable[[list[str]], Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    max_file_bytes: int,
) -> list[Path]:
    """Write tensors, one file's worth in memory at a time; return the files.

    Args:
        folder: an empty directory.
        num_bytes: name → size, of all tensors in order.
        read: gives the tensors of some names.
        metadata: kept in every file.
        max_file_bytes: a new file is begun rather than one larger than this, unless a tensor is.

    Raises:
        ConfigError: safetensors has no such dtype.
    """
    safetensors = _installed()
    from safetensors.torch import save_file

    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in num_bytes.items():
        if groups[-1] and filled + size > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files = [folder / _file_name(number, len(groups)) for number in range(len(groups))]
    for group, file in zip(groups, files, strict=True):
        file.touch()
        mode = file.stat().st_mode  # which files have here; nobody else may read what safetensors puts in its place
        try:
            save_file(dict(read(group)), file, metadata=dict(metadata))
        except (safetensors.SafetensorError, KeyError) as error:
            raise ConfigError(f"safetensors must have the dtype of every tensor; {error}; export to dcp.") from error
        file.chmod(mode)
        fsync(file)
    if len(groups) > 1:
        places = {name: file.name for group, file in zip(groups, files, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        files.append(folder / INDEX)
    return files


class SafetensorsSource:
    """Tensors in a file, or in the folder of an index; mapped into memory and read when they are used.

    Raises:
        CheckpointError: it is not such a file.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        safetensors = _installed()
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for file in _files_of(path):
            try:
                opened = stack.enter_context(safetensors.safe_open(file, framework="pt"))
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"a safetensors file must be whole; {file} is not ({error}).") from error
            self.metadata |= opened.metadata() or {}
            self._files |= dict.fromkeys(opened.keys(), opened)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor)."""
        for name, file in self._files.items():
            yield name, file.get_tensor(name)


def _installed() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ConfigError("safetensors must be installed: pip install mfdist[safetensors]") from error
    return safetensors


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        places = json.loads((path / INDEX).read_text("utf-8"))["weight_map"]
        return [path / name for name in dict.fromkeys(places.values())]
    return sorted(path.glob("*.safetensors"))


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

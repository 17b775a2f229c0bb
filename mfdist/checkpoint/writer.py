"""Writes a step's store beside the committed ones; whoever calls renames it into place."""

import datetime
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdist.checkpoint.dtypes import STORED_DTYPES, dtype_name
from mfdist.checkpoint.durability import fsync, write_file
from mfdist.checkpoint.engine import StepWriter
from mfdist.checkpoint.layout import (
    FILES_AT_ONCE,
    FORMAT,
    FORMAT_VERSION,
    RowBlocks,
    check_paths,
    dense_path,
    describe,
    row_blocks,
    table_path,
)
from mfdist.checkpoint.manifest import MANIFEST, Manifest
from mfdist.checkpoint.state import CheckpointState
from mfdist.errors import CheckpointError, ConfigError


def arrays_of(state: CheckpointState) -> dict[str, Tensor]:
    """Return every tensor of `state` by its path in the store.

    Raises:
        ConfigError: a name or a tensor cannot be stored. Nothing was written.
    """
    arrays: dict[str, Tensor] = {}
    for name, table in state.tables.items():
        arrays[table_path(name, "weight")] = table.weight
        arrays |= {table_path(name, key): tensor for key, tensor in table.optimizer.items()}
    arrays |= {dense_path(name): tensor for name, tensor in state.dense.items()}
    check_paths(arrays)
    for path, tensor in arrays.items():
        if tensor.layout != torch.strided or tensor.is_meta or dtype_name(tensor.dtype) not in STORED_DTYPES:
            raise ConfigError(
                f"a checkpoint stores strided tensors with data, of a dtype numpy has or a float of 8 or 16 bits; got "
                f"{describe(path)} ({tensor.layout}, {tensor.dtype}, {tensor.device}); convert it first."
            )
    return arrays


def write_step(root: Path, state: CheckpointState, arrays: dict[str, Tensor]) -> Manifest:
    """Write `state` into a new store at `root`; when it returns, files and directories are on disk.

    Args:
        root: does not exist yet.
        state: what to save; its tensors must not change meanwhile.
        arrays: `arrays_of(state)`.

    Raises:
        OSError: the disk is full, failing or read-only. What is at `root` is of no use.
        CheckpointError: files vanished while the step was written.

    Cost: every byte is read, written and waited for once; a host copy of FILES_AT_ONCE files at most.
    """
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "attributes": dict(state.attributes),
    }
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        writer = StepWriter(root, attributes, pool)
        for path, tensor in arrays.items():
            name = dtype_name(tensor.dtype)
            stored = STORED_DTYPES[name]
            blocks = row_blocks(tuple(tensor.shape), tensor.element_size())
            dtype = torch.empty(0, dtype=stored).numpy().dtype
            writer.write_array(path, blocks, dtype, {"dtype": name}, _host_rows(tensor, stored, blocks))
        manifest = Manifest(
            step=state.step,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            arrays=tuple(arrays),
            files=writer.finish(),
        )
        (root / MANIFEST).parent.mkdir()
        write_file(root / MANIFEST, manifest.to_bytes())
        for _ in pool.map(fsync, _seal(root, manifest)):
            pass  # a failed fsync is raised here
    return manifest


def _host_rows(tensor: Tensor, stored: torch.dtype, blocks: RowBlocks) -> Iterator[tuple[int, NDArray[Any]]]:
    if 0 in blocks.shape:
        return
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not blocks.shape:
        yield 0, tensor.cpu().view(stored).numpy()
        return
    num_rows = blocks.rows_per_file * FILES_AT_ONCE
    for start in range(0, blocks.num_rows, num_rows):
        yield start, tensor[start : start + num_rows].cpu().contiguous().view(stored).numpy()


def _seal(root: Path, manifest: Manifest) -> list[Path]:
    """Return every directory of the step, after making sure that each file written is still there and no other.

    Somebody may have deleted the directory meanwhile; zarr would have made it again, with a part of the files.
    """
    found: dict[str, int] = {}
    directories: list[Path] = []
    for directory, _, names in os.walk(root):
        directories.append(Path(directory))
        for name in names:
            path = Path(directory, name)
            found[path.relative_to(root).as_posix()] = path.stat().st_size
    expected = {name: entry.num_bytes for name, entry in manifest.files.items()}
    expected[MANIFEST] = len(manifest.to_bytes())
    if found != expected:
        name = min(dict(found.items() ^ expected.items()))
        raise CheckpointError(
            f"nobody else may touch a step being written; {root / name} was changed or removed; save again."
        )
    return directories

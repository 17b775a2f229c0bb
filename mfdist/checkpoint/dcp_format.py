"""Tensors to and from a `torch.distributed.checkpoint` folder, in one process.

That format keeps its metadata as a pickle: read only what you trust.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mfdist.errors import CheckpointError


def write_dcp(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, all of them in memory, and wait until they are on disk."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _alone():
        save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)


def read_dcp(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every (name, tensor) of a folder, put together where it was saved in shards; what is no tensor is left out.

    Raises:
        CheckpointError: it is not such a folder, or it is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        for name, entry in stored.items():
            if isinstance(entry, TensorStorageMetadata):
                state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
                with _alone():
                    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
                yield name, state[name]
    except (CheckpointException, OSError, EOFError) as error:
        raise CheckpointError(f"a torch.distributed.checkpoint must be whole; {folder} is not ({error}).") from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep torch from warning that there is one process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield

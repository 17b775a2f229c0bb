"""One checkpoint of whole tables, of which each server writes its shards."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mfdist.checkpoint.ranks import OneRank, Ranks, StoreRanks
from mfdist.checkpoint.state import CheckpointState, TableShard
from mfdist.errors import ConfigError, UnavailableError
from mfdist.table_server.messages import quoted
from mfdist.table_server.shard import Shard


def part_of(step: int, shards: Sequence[Shard]) -> CheckpointState:
    """Return what a server saves: its shards, which must not change meanwhile, and their versions."""
    made, versions = {}, {}
    for shard in shards:
        spec, state = shard.spec, shard.state()
        made[spec.table.name] = [
            TableShard(
                num_rows=spec.table.num_rows,
                row_dim=spec.table.row_dim,
                region=spec.region,
                weight=state.weight,
                optimizer=state.optimizer,
            )
        ]
        versions[_version_of(spec.table.name)] = torch.tensor(shard.version)
    return CheckpointState(step=step, tables={}, shards=made, dense=versions, attributes={})


def version_in(loaded: CheckpointState, table: str) -> int:
    """Return how many updates a table of a checkpoint has had; of one that ranks wrote, its step."""
    return int(loaded.dense.get(_version_of(table), torch.tensor(loaded.step)))


def meeting(directory: Path, rank: int, world_size: int, name: str) -> Ranks:
    """Return how the servers that save together meet.

    Raises:
        ConfigError: the name is none that a file can have.
        UnavailableError: the directory cannot be reached.
    """
    if world_size <= 1:
        return OneRank()
    if not name.isidentifier():
        raise ConfigError(
            f"a save of several servers needs a name of letters and digits for them to meet; got {quoted(name)}"
        )
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"servers must reach the checkpoint's directory; {directory}: {error.strerror}"
        ) from None
    return StoreRanks(FileStore(str(directory / f".meeting-{name}"), world_size), rank, world_size)


def _version_of(table: str) -> str:
    return f"versions/{table}"

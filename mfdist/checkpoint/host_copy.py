"""A copy of a state in host memory, taken again and again into the same memory."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mfdist.checkpoint.dense_shard import DenseShard, whole_and_shards
from mfdist.checkpoint.state import CheckpointState, TableShard, TableState


class HostCopy:
    """Memory for one copy of a run's state; it grows to the state's size and stays for the next copy.

    Touching new memory costs as much as copying into it, so only the first copy is slow.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, state: CheckpointState) -> CheckpointState:
        """Return the state with copies of its tensors, which the next call overwrites; its own may change then."""
        used: dict[str, Tensor] = {}
        devices: set[torch.device] = set()

        def copied(key: str, tensor: Tensor) -> Tensor:
            kept = self._kept.get(key)
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            used[key] = kept.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
            return kept

        def all_copied(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: copied(f"{key}/{name}", tensor) for name, tensor in tensors.items()}

        whole, parts = whole_and_shards(state.dense)
        parts |= state.dense_shards
        taken = CheckpointState(
            step=state.step,
            tables={
                name: TableState(
                    weight=copied(f"tables/{name}", table.weight),
                    optimizer=all_copied(f"tables/{name}/optimizer", table.optimizer),
                )
                for name, table in state.tables.items()
            },
            shards={
                name: [
                    TableShard(
                        num_rows=shard.num_rows,
                        row_dim=shard.row_dim,
                        region=shard.region,
                        weight=copied(f"shards/{name}/{number}", shard.weight),
                        optimizer=all_copied(f"shards/{name}/{number}/optimizer", shard.optimizer),
                    )
                    for number, shard in enumerate(shards)
                ]
                for name, shards in state.shards.items()
            },
            dense=all_copied("dense", whole),
            dense_shards={
                name: DenseShard(shape=part.shape, region=part.region, values=copied(f"dense/{name}", part.values))
                for name, part in parts.items()
            },
            attributes=state.attributes,
        )
        self._kept = used
        for device in devices:
            torch.cuda.synchronize(device)
        return taken


def num_bytes(state: CheckpointState) -> int:
    """Return the size of all tensors of a state."""
    return sum(tensor.nbytes for tensor in _tensors(state))


def _tensors(state: CheckpointState) -> Iterator[Tensor]:
    holders: list[TableState | TableShard] = [*state.tables.values()]
    holders += [shard for shards in state.shards.values() for shard in shards]
    for holder in holders:
        yield holder.weight
        yield from holder.optimizer.values()
    whole, parts = whole_and_shards(state.dense)
    yield from whole.values()
    yield from (part.values for part in {**parts, **state.dense_shards}.values())

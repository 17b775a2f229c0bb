"""The exchanges over a device mesh: one among all its ranks, and for two axes one along each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mfdist.errors import ConfigError
from mfdist.sharding.exchange import Exchange

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MeshExchanges:
    """What the tables over one mesh share: process groups, deadlines and counters.

    Args:
        mesh: of one axis, or of two: hosts × ranks of a host. It must hold every rank of the process group, in order.
        deadline_s, chunk_bytes, uses_peer_memory: see `Exchange`.

    Raises:
        ConfigError: the mesh leaves ranks out, permutes them, or has more than two axes; no rank was spoken to.

    Called on: all ranks of the mesh.
    """

    def __init__(
        self,
        mesh: "DeviceMesh",
        *,
        deadline_s: float = 300.0,
        chunk_bytes: int | None = None,
        uses_peer_memory: bool = True,
    ) -> None:
        check_ranks(mesh)
        shape = tuple(mesh.mesh.shape)
        self.shape = shape
        self.rank = dist.get_rank()
        self.world_size = world_size = dist.get_world_size()
        is_gpu = mesh.device_type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")

        def exchange(among: Sequence[int]) -> Exchange:
            return Exchange(
                among,
                self.device,
                deadline_s=deadline_s,
                chunk_bytes=chunk_bytes,
                uses_peer_memory=uses_peer_memory,
            )

        self.everyone = exchange(range(world_size))
        self.across_hosts: Exchange | None = None
        self.within_host: Exchange | None = None
        if len(shape) == 2:
            host, place = divmod(self.rank, shape[1])
            self.across_hosts = exchange(range(place, world_size, shape[1]))
            self.within_host = exchange(range(host * shape[1], (host + 1) * shape[1]))

    @property
    def all(self) -> tuple[Exchange, ...]:
        """Return every exchange, to read their counters."""
        made = (self.everyone, self.across_hosts, self.within_host)
        return tuple(exchange for exchange in made if exchange is not None)


def check_ranks(mesh: "DeviceMesh") -> None:
    """Raise ConfigError unless a mesh has one or two axes and holds every rank of the process group, in order."""
    shape = tuple(mesh.mesh.shape)
    ranks: list[int] = mesh.mesh.flatten().tolist()
    world_size = dist.get_world_size()
    if ranks != list(range(world_size)):
        raise ConfigError(
            f"a mesh of tables must hold all {world_size} ranks of the process group in order; got {_some(ranks)}; "
            f'make it by init_device_mesh("{mesh.device_type}", ({world_size},))'
        )
    if len(shape) > 2:
        raise ConfigError(f"tables are spread over one or two mesh axes; got a mesh of shape {shape}")


def _some(ranks: Sequence[int]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"{list(ranks[:8])} and {len(ranks) - 8} more"

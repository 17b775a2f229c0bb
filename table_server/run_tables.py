"""A run's tables on servers, as the configuration's `[servers]` says: what `mfdist train` gives to the loop."""

import threading
from collections.abc import Sequence
from typing import Final

import torch

from mfdist.config import RunConfig
from mfdist.errors import ConsistencyError
from mfdist.models import Transformer
from mfdist.models.loads import table_loads, table_specs
from mfdist.table_server.channel import ChannelConfig
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.table_server.placement import serve_tables, server_plan
from mfdist.training.run import SERVED_TABLES, RunDirectory
from mfdist.training.world import World

_WIRES: Final = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class ServedTables:
    """Tables on the servers that a configuration names; see `mfdist.training.table_home.TableHome`.

    Close it when training has ended.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._addresses = tuple(config.servers.addresses)
        self._moving = threading.Lock()
        self._servers: TableServers | None = None
        self._tables: list[RemoteTable] = []

    def move_in(self, model: Transformer, world: World, *, is_loaded_next: bool) -> None:
        """Replace the model's tables; each rank is a client."""
        config = self._config.servers
        began_at = self._addresses
        servers = TableServers(
            began_at,
            client=world.rank,
            num_clients=world.world_size,
            replicas=config.replicas,
            deadline_s=config.deadline_s,
            failover_s=config.failover_s,
            channel=ChannelConfig(
                token_file=config.token_file,
                ca=config.ca,
                certificate=config.certificate,
                private_key=config.private_key,
                server_name=config.server_name,
                insecure=config.insecure,
            ),
        )
        servers.joins_later = is_loaded_next
        with self._moving:
            self._servers = servers
            if self._addresses != began_at:
                servers.move(self._addresses)
        plan = server_plan(
            config.kind,
            table_specs(model),
            table_loads(model),
            len(servers),
            needs_whole_rows=self._config.optimizer.tables.rule == "rowwise_adagrad",
            forward_dtype=_WIRES[config.forward_dtype],
            backward_dtype=_WIRES[config.backward_dtype],
        )
        serve_tables(model, servers, plan)
        self._tables = [module for module in model.modules() if isinstance(module, RemoteTable)]

    def move_to(self, addresses: Sequence[str]) -> None:
        """Reach servers of pairs where they are now; may be called by any thread, before `move_in` too."""
        with self._moving:
            if tuple(addresses) != self._addresses:
                self._addresses = tuple(addresses)
                if self._servers is not None:
                    self._servers.move(addresses)

    def save(self, run: RunDirectory, step: int, world: World) -> None:
        """Let the servers save, and keep as many steps as the run does, and the one before."""
        servers, keep = self._connected(), self._config.checkpoint
        servers.flush()  # of this rank, before any saves
        world.gather(None)

        def save() -> None:
            servers.save(str(run.path.absolute() / SERVED_TABLES), step)
            run.served_tables.prune(keep.keep_last + 1, keep.keep_every)

        world.on_first(save)

    def load(self, run: RunDirectory, step: int, world: World) -> None:
        """Let the servers load, and follow them."""
        servers = self._connected()
        world.on_first(lambda: servers.load(str(run.path.absolute() / SERVED_TABLES), step))
        servers.joins_later = False
        for table in self._tables:
            table.resume()

    def check_new(self) -> None:
        """Raise ConsistencyError where the servers' tables have been trained: a new run would go on with them."""
        trained = [table.spec.name for table in self._tables if table.num_updates]
        if trained:
            raise ConsistencyError(
                f'a new run needs tables of its own; "{trained[0]}" on {self._config.servers.addresses[0]} has had '
                "updates; give the servers new data folders, or drop their tables"
            )

    def close(self) -> None:
        """Wait for what was pushed, and let the servers go."""
        with self._moving:
            servers, self._servers = self._servers, None
        if servers is not None:
            servers.close()

    def _connected(self) -> TableServers:
        assert self._servers is not None, "move_in comes first"
        return self._servers

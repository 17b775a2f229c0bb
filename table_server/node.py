"""What one server holds and does, in the library's own terms; `service` speaks the protocol."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.ranks import OneRank, Ranks, StoreRanks
from mfdist.checkpoint.state import CheckpointState, TableShard, TableState
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import ConfigError, ConsistencyError, MfdistError, UnavailableError
from mfdist.optim import RowOptimizer
from mfdist.table_server.config import ServerSection
from mfdist.table_server.contribution import push_of
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.shard import Shard
from mfdist.table_server.status import UnknownTableError
from mfdist.table_server.store import Held, Store
from mfdist.table_server.updates import Updates

_T = TypeVar("_T")

#: How often the log's size is looked at.
_LOOK_S = 1.0


@dataclass
class Life:
    """A shard from its making, or its last loading, on."""

    name: str
    updates: Updates
    since: int  # updates before it began
    is_as_drawn: bool = False  # no update, and nothing written
    is_unsaved: bool = False  # something was written that no checkpoint has

    @property
    def shard(self) -> Shard:
        """Return the shard."""
        return self.updates.shard


class Node:
    """The shards of a server, recovered from its folder.

    Made before the event loop runs; everything else is called on it.

    Args:
        config: of the server; its folder must be given.

    Raises:
        UnavailableError: another server holds the folder.
        CheckpointError: what is in it is damaged.
    """

    def __init__(self, config: ServerSection) -> None:
        if config.data is None:
            raise ConfigError("a server needs a folder for its data; give server.data or --data DIR")
        self.config = config
        self.store = Store(Path(config.data), is_logged=config.durability == "log")
        num_threads = config.threads or os.cpu_count() or 1
        torch.set_num_threads(num_threads)
        self._num_threads = num_threads + 1
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="mfdist-table")
        self._num_running = 0
        #: Counts since the start, by name.
        self.counters: Counter[str] = Counter()
        self.row_hits: Counter[str] = Counter()
        self.is_draining = False
        self._sessions: dict[int, int] = {}  # client → session
        self._admin = asyncio.Lock()
        self.num_clients = self.store.num_clients
        #: Rows are others than those acknowledged after each start where pushes are not logged.
        self.epoch = self.store.epoch if self.store.is_logged else self.store.next_epoch()
        self._lives: dict[str, Life] = {}
        for held in self.store.find():
            life = self._life(held)
            logged = ((version, push_of(messages)) for version, messages in self.store.pushes(held.life))
            self.counters["replayed_pushes"] += life.updates.replay(logged, self.num_clients)
            self._lives[held.shard.name] = life

    @property
    def lives(self) -> Sequence[Life]:
        """Return all shards, by name."""
        return [self._lives[name] for name in sorted(self._lives)]

    @property
    def num_queued(self) -> int:
        """Return how much waits for a thread."""
        return max(0, self._num_running - self._num_threads)

    def life(self, table: str) -> Life:
        """Return the shard of a table.

        Raises:
            UnknownTableError: there is none here.
        """
        if table not in self._lives:
            known = ", ".join(f'"{name}"' for name in sorted(self._lives)[:3]) or "none"
            raise UnknownTableError(f'a table must be made before it is used; got "{table}", this server has {known}')
        return self._lives[table]

    async def run(self, function: Callable[..., _T], *args: object) -> _T:
        """Run what takes long in a thread."""
        self._num_running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        finally:
            self._num_running -= 1

    async def create(self, spec: ShardSpec) -> tuple[Life, bool]:
        """Make a shard, unless it is there; return it, and whether it was there.

        Raises:
            ConsistencyError: it is there with other values.
            ConfigError: there is no memory for it.
        """
        async with self._admin:
            if (known := self._lives.get(spec.table.name)) is not None:
                # How rows are trained may have changed since, and who only looks up does not say.
                if known.shard.spec != (
                    spec if spec.optimizer else replace(spec, optimizer=known.shard.spec.optimizer)
                ):
                    raise ConsistencyError(
                        f'a table is made once; "{spec.table.name}" is here as {known.shard.spec} and was asked for as '
                        f"{spec}; drop it first, or give the new one another name"
                    )
                return known, True
            shard = await self.run(_drawn, spec)
            name = await self.run(self.store.add, spec)
            life = self._lives[spec.table.name] = replace(self._life(Held(shard, name, {}, {})), is_as_drawn=True)
            return life, False

    async def train(self, table: str, optimizer: RowOptimizer | None) -> Life:
        """Train a shard by another optimiser from its next update on, or freeze it.

        Asked by several clients for the same, it is done once.
        """
        async with self._admin, contextlib.AsyncExitStack() as stack:
            before = self.life(table)
            shard = before.shard
            if shard.spec.optimizer == optimizer and before.since == shard.version:
                return before
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            spec = replace(shard.spec, optimizer=optimizer)
            fresh = Shard(spec, TableState(weight=shard.rows), shard.version)
            async with before.updates.gate.writing():
                if before.is_as_drawn and not shard.version:
                    held = Held(fresh, await self.run(self.store.add, spec), {}, {})
                else:
                    held = Held(fresh, token_hex(8), {}, {})
                    others = [_held(life) for life in self.lives if life is not before]
                    await self.run(self.store.checkpoint, [held, *others])
                self._lives[table] = replace(self._life(held), is_as_drawn=before.is_as_drawn)
                before.updates.forget()
            return self._lives[table]

    async def drop(self, table: str) -> bool:
        """Forget a table; return whether it was there."""
        async with self._admin:
            life = self._lives.pop(table, None)
            if life is not None:
                async with life.updates.changing:
                    await self.run(self.store.forget, table)
                    life.updates.forget()
            return life is not None

    async def join(self, client: int, num_clients: int, session: int) -> None:
        """Let a client take part, in the place of an earlier one of its number.

        Raises:
            ConfigError: its number is not one of `num_clients`.
            ConsistencyError: others joined with another number of clients while pushes wait.
        """
        if not 0 <= client < num_clients:
            raise ConfigError(f"a client's number must lie in [0, {num_clients}); got {client}")
        async with self._admin:
            if num_clients != self.num_clients:
                if any(life.updates.is_waiting for life in self._lives.values()):
                    raise ConsistencyError(
                        f"the number of clients changes between steps; pushes of {self.num_clients} clients wait for "
                        f"the others and client {client} says there are {num_clients}; load a checkpoint first"
                    )
                await self.run(self.store.set_num_clients, num_clients)
                self.num_clients = num_clients
                self._sessions.clear()
            self._sessions[client] = session

    def check_client(self, client: int, session: int, epoch: int) -> None:
        """Raise ConsistencyError unless a client may push."""
        if epoch != self.epoch:
            raise ConsistencyError(
                f"a push must be of the server's epoch {self.epoch}; got {epoch}; rows were loaded anew: join again"
            )
        if client not in self._sessions:
            raise UnavailableError(f"a client must join before it pushes; client {client} has not since the start")
        if self._sessions[client] != session:
            raise ConsistencyError(
                f"one process at a time may be client {client}; another one has joined after this one"
            )

    async def checkpoint(self) -> StepInfo:
        """Save all shards in the server's own folder and empty the log; lookups go on meanwhile, updates wait."""
        async with self._admin, contextlib.AsyncExitStack() as stack:
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            self.counters["checkpoints"] += 1
            info = await self.run(self.store.checkpoint, [_held(life) for life in self.lives])
            for life in self.lives:
                life.is_unsaved = False
            return info

    async def life_to_push_to(self, table: str) -> Life:
        """Return the shard of a table, what was written to it on disk: a push is logged on top of that."""
        if self.life(table).is_unsaved:
            await self.checkpoint()
        return self.life(table)

    async def checkpoint_when_full(self) -> None:
        """Checkpoint whenever the log has grown to its limit; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.store.ledger.num_bytes > self.config.log_gib * 2**30:
                await self.checkpoint()

    async def save(self, directory: Path, step: int, rank: int, world_size: int, meeting: str) -> StepInfo:
        """Save all shards as this server's part of one checkpoint of all tables.

        Raises:
            UnavailableError: another server did not come, or another writer holds the directory.
            CheckpointError: the directory cannot be written.
        """
        async with self._admin, contextlib.AsyncExitStack() as stack:
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            shards, versions = {}, {}
            for life in self.lives:
                spec, state = life.shard.spec, life.shard.state()
                shards[spec.table.name] = [
                    TableShard(
                        num_rows=spec.table.num_rows,
                        row_dim=spec.table.row_dim,
                        region=spec.region,
                        weight=state.weight,
                        optimizer=state.optimizer,
                    )
                ]
                versions[_version_of(spec.table.name)] = torch.tensor(life.shard.version)
            state_of_all = CheckpointState(step=step, tables={}, shards=shards, dense=versions, attributes={})
            ranks = _meeting(directory, rank, world_size, meeting)
            saving = asyncio.ensure_future(self.run(CheckpointDirectory(directory, ranks=ranks).save, state_of_all))
            try:
                return await asyncio.shield(saving)
            except asyncio.CancelledError:  # whoever asked has gone, or asks anew: another server has died
                ranks.leave()
                await asyncio.gather(saving, return_exceptions=True)  # it reads what may not change meanwhile
                raise

    async def load(self, directory: Path, step: int | None) -> int:
        """Take all shards from a checkpoint; return its step. Clients must join again.

        Raises:
            CheckpointError: there is no such step, it lacks a table or a state, or is damaged; nothing was changed.
        """
        async with self._admin, contextlib.AsyncExitStack() as stack:
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            regions = {life.shard.name: [life.shard.spec.region] for life in self.lives}
            loaded = await self.run(lambda: CheckpointDirectory(directory).load(step, shards=regions))
            made = []
            for life in self.lives:
                name, shard = life.shard.name, loaded.shards[life.shard.name][0]
                version = int(loaded.dense.get(_version_of(name), torch.tensor(loaded.step)))
                state = TableState(weight=shard.weight, optimizer=shard.optimizer)
                fresh = Shard(life.shard.spec, state, version)
                made.append(Held(fresh, token_hex(8), {}, {}))
            for life in self.lives:
                await stack.enter_async_context(life.updates.gate.writing())
            # The commit of this checkpoint is what changes the server's mind, for good.
            await self.run(self.store.checkpoint, made)
            self.epoch = await self.run(self.store.next_epoch)
            self._sessions.clear()
            for held in made:
                before = self._lives[held.shard.name]
                self._lives[held.shard.name] = self._life(held)
                before.updates.forget()
            return loaded.step

    async def write(self, table: str, values: torch.Tensor, row_ids: torch.Tensor | None, at: int, state: str) -> None:
        """Replace rows, or values of a state, at ids or from the shard's row `at` on; on disk after `checkpoint`."""
        life = self.life(table)
        updates = life.updates
        async with updates.changing, updates.gate.writing():
            place = slice(at, at + len(values)) if row_ids is None else row_ids
            life.is_as_drawn, life.is_unsaved = False, True
            await self.run(updates.shard.write, values, place, state)

    async def set_version(self, table: str, version: int) -> None:
        """Go on from a number of updates, as rows that were written have had them."""
        updates = self.life(table).updates
        async with updates.changing:
            updates.shard.set_version(version)
            updates.forget()

    def close(self) -> None:
        """Let threads and folder go."""
        self._threads.shutdown()
        self.store.close()

    def _life(self, held: Held) -> Life:
        staleness = None if self.config.consistency == "synchronous" else self.config.max_staleness
        updates = Updates(held.shard, self.store.log(held.life), self.run, staleness)
        updates.steps.update(held.steps)
        updates.kept.update(held.kept)
        return Life(held.life, updates, held.shard.version)


def _drawn(spec: ShardSpec) -> Shard:
    try:
        return Shard(spec)
    except MfdistError:
        raise
    except (RuntimeError, MemoryError):  # torch's, where it gets no memory
        raise ConfigError(
            f"a shard must fit into the server's memory; got {spec.region.shape} in {spec.table.dtype} for table "
            f'"{spec.table.name}"; spread it over more servers'
        ) from None


def _held(life: Life) -> Held:
    return Held(life.shard, life.name, dict(life.updates.steps), dict(life.updates.kept))


def _version_of(table: str) -> str:
    return f"versions/{table}"


def _meeting(directory: Path, rank: int, world_size: int, name: str) -> Ranks:
    if world_size <= 1:
        return OneRank()
    if not name.isidentifier():
        raise ConfigError(
            f"a save of several servers needs a name of letters and digits for them to meet; got {name!r}"
        )
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"servers must reach the checkpoint's directory; {directory}: {error.strerror}"
        ) from None
    return StoreRanks(FileStore(str(directory / f".meeting-{name}"), world_size), rank, world_size)

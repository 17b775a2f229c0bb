"""What one server holds and does, in the library's own terms; `service` speaks the protocol."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import TableState
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import ConfigError, ConsistencyError, MfdistError, UnavailableError
from mfdist.optim import RowOptimizer
from mfdist.table_server import saving
from mfdist.table_server.checkpointer import Checkpointer
from mfdist.table_server.codec import unpacked
from mfdist.table_server.config import ReplicationConfig, ServerSection
from mfdist.table_server.contribution import logged_push
from mfdist.table_server.follower import Follower
from mfdist.table_server.life import Life
from mfdist.table_server.messages import ShardSpec, differences, quoted
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.shard import Shard
from mfdist.table_server.standing import Standing
from mfdist.table_server.status import UnknownTableError
from mfdist.table_server.store import Held, Store
from mfdist.table_server.updates import Updates
from mfdist.table_server.warm_up import WarmUp

_T = TypeVar("_T")


class Node:
    """The shards of a server, recovered from its folder.

    Made before the event loop runs; everything else is called on it.

    Args:
        config: of the server; its folder must be given.
        replication: its pair, by default none.
        is_paired: whether it is of a pair although `replication` does not name the other server; see `Pairing`.

    Raises:
        ConfigError: the folder is not given, or pushes are not logged, which a pair needs.
        UnavailableError: another server holds the folder.
        CheckpointError: what is in it is damaged.
    """

    def __init__(
        self, config: ServerSection, replication: ReplicationConfig | None = None, *, is_paired: bool = False
    ) -> None:
        if config.data is None:
            raise ConfigError("a server needs a folder for its data; give server.data or --data DIR")
        self.config, replication = config, replication or ReplicationConfig()
        self.store = Store(Path(config.data), is_logged=config.durability == "log")
        num_threads = config.threads or os.cpu_count() or 1
        torch.set_num_threads(num_threads)
        self._num_threads = num_threads + 1
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="mfdist-table")
        self._num_running = 0
        #: What follows a primary, where this is the replica of a pair.
        self.follower = Follower(self, replication.timeout_s)
        self._warm_up = WarmUp()
        #: What checkpoints when the log is full.
        self.checkpointer = Checkpointer(self)
        #: Counts since the start, by name.
        self.counters: Counter[str] = Counter()
        self.row_hits: Counter[str] = Counter()
        self.is_draining = False
        #: Held by whatever changes which shards there are.
        self.admin = asyncio.Lock()
        self._lives: dict[str, Life] = {}
        try:
            has_peer = is_paired or bool(replication.peer)
            self.standing = Standing(self.store, replication.peer if has_peer else None)
            self._recover()
        except BaseException:
            self.close()
            raise

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
            UnavailableError: this is a replica that is being copied to.
        """
        if table not in self._lives:
            if not self.standing.is_whole:
                raise UnavailableError(
                    f"a replica must have its rows; {quoted(table)} is being copied; ask the primary"
                )
            known = ", ".join(f'"{name}"' for name in sorted(self._lives)[:3]) or "none"
            raise UnknownTableError(
                f"a table must be made before it is used; got {quoted(table)}, this server has {known}"
            )
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
        self.standing.check_primary()
        async with self.admin:
            if (known := self._lives.get(spec.table.name)) is not None:
                # How rows are trained may have changed since, and who only looks up does not say.
                if known.shard.spec != (
                    spec if spec.optimizer else replace(spec, optimizer=known.shard.spec.optimizer)
                ):
                    here, asked = differences(known.shard.spec, spec)
                    raise ConsistencyError(
                        f'a table is made once; "{spec.table.name}" is here with {here}, and was asked for with '
                        f"{asked}; drop it first, or give the new one another name"
                    )
                return known, True
            life = await self.draw(spec)
            await self._tell_replica()
            return life, False

    async def draw(self, spec: ShardSpec, name: str | None = None) -> Life:
        """Make a shard whose rows are drawn from its seed, under a name of its life. Holding `admin`."""
        shard = await self.run(_drawn, spec)
        name = await self.run(self.store.add, spec, name)
        life = self._lives[spec.table.name] = replace(self._life(Held(shard, name, {}, {})), is_as_drawn=True)
        return life

    async def train(self, table: str, optimizer: RowOptimizer | None) -> Life:
        """Train a shard by another optimiser from its next update on, or freeze it.

        Asked by several clients for the same, it is done once.
        """
        self.standing.check_primary()
        async with self.admin, contextlib.AsyncExitStack() as stack:
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
                    held = Held(fresh, token_hex(8), {}, {}, is_saved=True)
                    await self._save_own([held])
                self._use([held])
                self._lives[table].is_as_drawn = before.is_as_drawn
            await stack.aclose()
            await self._tell_replica()
            return self._lives[table]

    async def drop(self, table: str) -> bool:
        """Forget a table; return whether it was there."""
        self.standing.check_primary()
        async with self.admin:
            was_there = await self.forget(table)
            await self._tell_replica()
            return was_there

    async def forget(self, table: str) -> bool:
        """Forget a table; return whether it was there. Holding `admin`."""
        life = self._lives.pop(table, None)
        if life is not None:
            async with life.updates.changing:
                await self.run(self.store.forget, table)
                life.updates.forget()
        return life is not None

    async def join(self, client: int, num_clients: int, session: int, seen: int = 0) -> None:
        """Let a client take part, in the place of an earlier one of its number.

        Args:
            client: its number.
            num_clients: how many there are.
            session: what it drew when it started.
            seen: the highest epoch it has had.

        Raises:
            ConfigError: its number is not one of `num_clients`.
            ConsistencyError: others joined with another number of clients while pushes wait.
            NotPrimaryError: the server of the pair to join is the other one.
        """
        self.standing.check_primary()
        self.standing.check_seen(seen)
        if not num_clients:
            raise ConfigError("num_clients must be 1 or more; got 0; give how many clients train together")
        if not 0 <= client < num_clients:
            raise ConfigError(f"a client's number must lie in [0, {num_clients}); got {client}")
        if num_clients != self.standing.num_clients:
            async with self.admin:
                known = self.standing.num_clients
                if any(life.updates.is_waiting for life in self._lives.values()):
                    raise ConsistencyError(
                        f"the number of clients changes between steps; pushes of {known} clients wait for the others "
                        f"and client {client} says there are {num_clients}; load a checkpoint first"
                    )
                if known != num_clients:
                    await self.standing.set_num_clients(num_clients)
                    await self._tell_replica()
            self.standing.check_primary()
        self.standing.joined(client, session)

    async def checkpoint(self) -> StepInfo:
        """Save all shards in the server's own folder and empty the log; lookups go on meanwhile, updates wait.

        Raises:
            UnavailableError: this is a replica that is being copied to.
        """
        async with self.admin, contextlib.AsyncExitStack() as stack:
            if not self.standing.is_whole:
                raise UnavailableError("a server must have its rows to save them; they are being copied; try again")
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            return await self._save_own()

    async def life_to_push_to(self, table: str) -> Life:
        """Return the shard of a table, what was written to it on disk: a push is logged on top of that."""
        if self.life(table).is_unsaved:
            await self.checkpoint()
        return self.life(table)

    async def save(self, directory: Path, step: int, rank: int, world_size: int, meeting: str) -> StepInfo:
        """Save all shards as this server's part of one checkpoint of all tables.

        Raises:
            UnavailableError: another server did not come, or another writer holds the directory.
            CheckpointError: the directory cannot be written.
        """
        self.standing.check_primary()
        async with self.admin, contextlib.AsyncExitStack() as stack:
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            state = saving.part_of(step, [life.shard for life in self.lives])
            ranks = saving.meeting(directory, rank, world_size, meeting)
            written = asyncio.ensure_future(self.run(CheckpointDirectory(directory, ranks=ranks).save, state))
            try:
                return await asyncio.shield(written)
            except asyncio.CancelledError:  # whoever asked has gone, or asks anew: another server has died
                ranks.leave()
                await asyncio.gather(written, return_exceptions=True)  # it reads what may not change meanwhile
                raise

    async def load(self, directory: Path, step: int | None) -> int:
        """Take all shards from a checkpoint; return its step. Clients must join again.

        Raises:
            CheckpointError: there is no such step, it lacks a table or a state, or is damaged; nothing was changed.
        """
        self.standing.check_primary()
        async with self.admin, contextlib.AsyncExitStack() as stack:
            for life in self.lives:
                await stack.enter_async_context(life.updates.changing)
            regions = {life.shard.name: [life.shard.spec.region] for life in self.lives}
            loaded = await self.run(lambda: CheckpointDirectory(directory).load(step, shards=regions))
            made = []
            for life in self.lives:
                name, shard = life.shard.name, loaded.shards[life.shard.name][0]
                version = saving.version_in(loaded, name)
                state = TableState(weight=shard.weight, optimizer=shard.optimizer)
                fresh = Shard(life.shard.spec, state, version)
                made.append(Held(fresh, token_hex(8), {}, {}, is_saved=True))
            for life in self.lives:
                await stack.enter_async_context(life.updates.gate.writing())
            # The commit of this checkpoint is what changes the server's mind, for good.
            await self._save_own(made)
            await self.standing.loaded()
            self._use(made)
            await stack.aclose()
            await self._tell_replica()
            return loaded.step

    async def write(self, life: Life, request: pb.WriteRequest, at: int, edit: str) -> int:
        """Do what a message of a write says, from the shard's row `at` on; return how many values it had.

        On disk after `checkpoint`. `edit` names it, for replicas.
        """
        has_values = request.HasField("values") or not request.HasField("version")
        values = await self.run(unpacked, [request.values], "values") if has_values else None
        row_ids = unpacked([request.row_ids], "row_ids") if request.HasField("row_ids") else None
        updates = life.updates
        async with updates.changing:
            await updates.on_disk(updates.shard.version)  # a replica has them before what is written now
            async with updates.gate.writing():
                life.is_as_drawn, life.is_unsaved, life.edit = False, True, edit
                if values is not None:
                    place = slice(at, at + len(values)) if row_ids is None else row_ids
                    await self.run(updates.shard.write, values, place, request.state)
                if request.HasField("version"):
                    updates.shard.set_version(request.version)
                    updates.forget()
            link = self.standing.link
            told = link.wrote(life.name, request, at, edit) if link is not None else None
        if told is not None:
            await told
        return 0 if values is None else len(values)

    # For the pair.

    async def use_copies(self, made: Sequence[Held]) -> None:
        """Hold shards that were copied from the primary. Holding `admin`."""
        for held in made:
            if held.shard.name not in self._lives:
                await self.run(self.store.add, held.shard.spec)
        await self._save_own(made)
        self._use(made)

    async def let_go(self, table: str) -> None:
        """Free the rows of a shard that is about to be copied; they stay on disk. Holding `admin`."""
        life = self._lives.pop(table, None)
        if life is not None:
            async with life.updates.changing:
                life.updates.forget()

    async def _tell_replica(self) -> None:
        """Let the replica have the shards as they are now, if it is there. Holding `admin`."""
        if self.standing.link is not None:
            await self.standing.link.sync()

    async def _save_own(self, made: Sequence[Held] = ()) -> StepInfo:
        """Save all shards, some of which are about to be others. Holding `admin`, and all shards' `changing`."""
        names = {held.shard.name for held in made}
        kept = [life for life in self.lives if life.shard.name not in names]
        self.counters["checkpoints"] += 1
        info = await self.run(self.store.checkpoint, [*made, *(life.held for life in kept)])
        for life in kept:
            life.is_unsaved, life.base = False, life.shard.version
        return info

    def _use(self, made: Sequence[Held]) -> None:
        for held in made:
            before = self._lives.get(held.shard.name)
            self._lives[held.shard.name] = self._life(held)
            if before is not None:
                before.updates.forget()

    def _recover(self) -> None:
        for held in self.store.find():
            life = self._life(held)
            logged = self.store.pushes(held.life, held.shard.version)
            pushes = ((version, logged_push(messages)) for version, messages in logged)
            self.counters["replayed_pushes"] += life.updates.replay(pushes, self.standing.num_clients)
            self._lives[held.shard.name] = life
        self.store.recovered()

    def close(self) -> None:
        """Let threads and folder go."""
        self._threads.shutdown()
        self._warm_up.close()
        self.store.close()

    def _life(self, held: Held) -> Life:
        staleness = None if self.config.consistency == "synchronous" else self.config.max_staleness
        updates = Updates(held.shard, self.standing.log(held.life), self.run, staleness)
        updates.kernels = self._warm_up.begin(held.shard)
        updates.steps.update(held.steps)
        updates.kept.update(held.kept)
        version = held.shard.version
        return Life(held.life, updates, version, base=version if held.is_saved else None, edit=held.edit)


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

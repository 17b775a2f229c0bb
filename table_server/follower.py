"""The replica's side of a pair: takes in what the primary has and does, and takes over when it is told to."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfdist.checkpoint.state import TableState
from mfdist.errors import ConfigError, ConsistencyError, InternalError, UnavailableError
from mfdist.table_server import epoch as epochs
from mfdist.table_server.codec import unpacked
from mfdist.table_server.contribution import logged_push
from mfdist.table_server.life import Life
from mfdist.table_server.messages import ShardSpec, shard_of
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.shard import Shard
from mfdist.table_server.store import Held
from mfdist.table_server.updates import Kept

if TYPE_CHECKING:
    from mfdist.table_server.node import Node

_INBOX = 32  # messages that wait to be applied

_logger = logging.getLogger(__name__)


class Follower:
    """Follows one primary at a time.

    Args:
        node: what the server holds.
        timeout_s: how long a primary may be silent before it is taken to be gone.
    """

    def __init__(self, node: "Node", timeout_s: float) -> None:
        self._node = node
        self.timeout_s = timeout_s
        self._turn = asyncio.Lock()  # held while a primary is followed
        self._ending = asyncio.Event()
        self._heard_s: float | None = None  # when the primary that is followed was last heard

    async def follow(self, requests: AsyncIterator[pb.ReplicateRequest]) -> AsyncGenerator[pb.ReplicateReply, None]:
        """Take in what a primary sends; yield what is on disk.

        Raises:
            ConfigError: this server has no peer, or the peer is not told from it.
            CheckpointError: the log cannot be written.
        """
        standing = self._node.standing
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            raise ConfigError("a primary must greet its replica first; got something else; see ReplicateRequest")
        hello = first.hello
        if standing.role == "single":
            raise ConfigError("a replica must be told of its peer; this server has none; start it with --peer")
        mine = self._node.store.server_id
        if not epochs.is_id(hello.server_id):
            raise ConfigError(f"a server's id must be 16 hexadecimal digits; got {hello.server_id!r}")
        if epochs.who(hello.server_id) == epochs.who(mine):
            raise ConfigError(
                f"servers of a pair must be told apart; {hello.server_id} and {mine} begin alike; give the empty one "
                "another data folder"
            )
        self._ending.set()  # of one that was followed before
        async with self._turn:
            self._ending = asyncio.Event()
            await standing.step_down(hello.epoch)
            holding = pb.Holding(epoch=standing.epoch, server_id=mine)
            if standing.role == "replica" and hello.epoch >= standing.epoch:
                # What is waiting for the disk must be there before it is spoken of.
                await asyncio.to_thread(self._node.store.remember, role="replica")
                holding.shards.extend(
                    pb.HeldShard(history=life.name, version=life.shard.version, edit=life.edit)
                    for life in self._node.lives
                )
            yield pb.ReplicateReply(number=1, holding=holding)
            if standing.role == "replica" and hello.epoch >= standing.epoch:
                async with contextlib.aclosing(self._replies(requests)) as replies:
                    async for reply in replies:
                        yield reply

    async def take_over(self, seen: int) -> int:
        """Make this replica the primary; return its epoch.

        Args:
            seen: the highest epoch that the client has had, who asks for it.

        Raises:
            ConfigError: the server has no peer.
            NotPrimaryError: it is a primary already, and the client has seen a later one.
            UnavailableError: the primary is alive, or this replica lacks something that was acknowledged.
        """
        node, standing = self._node, self._node.standing
        if standing.role == "single":
            raise ConfigError("a server must have a peer to take over from it; this one has none; start it with --peer")
        if standing.role == "replica":
            self._check_may_take_over(seen)
            self._ending.set()
            async with self._turn, node.admin:
                if standing.role == "replica":
                    self._check_may_take_over(seen)
                    await standing.take_over(seen, self._fork)
        standing.check_seen(seen)
        return standing.epoch

    def end(self) -> None:
        """Follow no longer, as the server is draining."""
        self._ending.set()

    def _check_may_take_over(self, seen: int) -> None:
        standing = self._node.standing
        if not standing.is_whole:
            raise UnavailableError(
                f"a replica must have all rows to take over; it was being copied to; start {standing.peer} again"
            )
        if seen > standing.epoch:
            raise UnavailableError(
                "a replica must have all that was acknowledged to take over; it was last in sync at epoch "
                f"{epochs.text(standing.epoch)}, the client has seen {epochs.text(seen)}; start {standing.peer} again, "
                "or load a checkpoint"
            )
        silent_s = self.timeout_s if self._heard_s is None else time.monotonic() - self._heard_s
        if silent_s < self.timeout_s and not self._ending.is_set():
            raise UnavailableError(
                f"a replica takes over when its primary is gone; {standing.peer} was heard {silent_s:.1f} s ago; see "
                "why this client does not reach it"
            )

    async def _fork(self) -> None:
        """Begin new histories, of which the old primary has nothing."""
        node, lives = self._node, self._node.lives
        names = await node.run(node.store.fork, [life.name for life in lives])
        for life, name in zip(lives, names, strict=True):
            life.name, life.updates.log = name, node.standing.log(name)

    async def _replies(self, requests: AsyncIterator[pb.ReplicateRequest]) -> AsyncGenerator[pb.ReplicateReply, None]:
        """Read, apply and acknowledge side by side until the primary is gone or another takes over."""
        inbox: asyncio.Queue[pb.ReplicateRequest | None] = asyncio.Queue(_INBOX)
        written: asyncio.Queue[tuple[int, Awaitable[Any] | None] | None] = asyncio.Queue()
        replies: asyncio.Queue[pb.ReplicateReply | None] = asyncio.Queue()
        copies = _Copies(self._node)
        last, doing = 1, set[asyncio.Task[Any]]()

        async def read() -> None:
            async for request in requests:
                self._heard_s = time.monotonic()
                await inbox.put(request)
                self._heard_s = time.monotonic()  # what is here already was not waited for
            await inbox.put(None)

        async def apply() -> None:
            while (request := await inbox.get()) is not None:
                taking = asyncio.ensure_future(copies.take(request))
                doing.add(taking)
                taking.add_done_callback(doing.discard)
                await written.put((request.number, await asyncio.shield(taking)))
            await written.put(None)

        async def acknowledge() -> None:
            nonlocal last
            while (one := await written.get()) is not None:
                last, on_disk = one
                if on_disk is not None:
                    await on_disk
                await replies.put(pb.ReplicateReply(number=last))
            await replies.put(None)

        async def beat() -> None:
            while True:  # while something large is applied, too
                await asyncio.sleep(self.timeout_s / 4)
                await replies.put(pb.ReplicateReply(number=last))

        async def end() -> None:
            await self._ending.wait()
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            await inbox.put(None)

        def failed(task: "asyncio.Task[None]") -> None:
            if _has_failed(task):
                replies.put_nowait(None)

        self._heard_s = time.monotonic()
        reading = asyncio.ensure_future(read())
        tasks = [reading, *map(asyncio.ensure_future, (apply(), acknowledge(), beat(), end()))]
        for task in tasks:
            task.add_done_callback(failed)
        try:
            while (reply := await replies.get()) is not None:
                yield reply
            for task in tasks:
                if _has_failed(task):
                    task.result()
        finally:
            self._heard_s = None
            for task in tasks:
                task.cancel()
            # What has begun to change rows must end before anyone else does anything with them.
            await asyncio.gather(*tasks, *doing, return_exceptions=True)


class _Copies:
    """What one connection brings, applied to the node message by message."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._copied: dict[str, _Copy] = {}  # by history, of the last list
        self._push: list[bytes] = []

    async def take(self, request: pb.ReplicateRequest) -> Awaitable[Any] | None:
        """Apply a message; return what is done once it is on disk, if it is not yet.

        Raises:
            InternalError: it makes no sense here.
        """
        match request.WhichOneof("what"):
            case "push":
                return await self._take_push(request.push)
            case "shards":
                await self._take_list(request.shards)
            case "copy":
                await self._take_copy(request.copy)
            case "write":
                write = request.write
                await self._node.write(self._life(write.history), write.request, write.at, write.edit)
            case "settled":
                await self._node.standing.followed(request.settled.epoch, request.settled.rows_since)
        return None

    async def _take_push(self, part: pb.LoggedPush) -> Awaitable[Any] | None:
        self._push.append(part.message)
        if not part.is_last:
            return None
        messages, self._push = self._push, []
        node = self._node
        node.counters["followed_pushes"] += 1
        push = await node.run(logged_push, messages)
        life = self._life(part.history)
        if life.is_unsaved:
            await node.checkpoint()
        return await life.updates.follow(part.version, push, node.standing.num_clients)

    async def _take_list(self, shards: pb.ShardList) -> None:
        node, standing = self._node, self._node.standing
        async with node.admin:
            if standing.num_clients != shards.num_clients:
                await standing.set_num_clients(shards.num_clients)
            listed = {entry.shard.table.name: entry for entry in shards.entries}
            for life in node.lives:
                if life.shard.name not in listed:
                    await node.forget(life.shard.name)
            self._copied = {}
            for table, entry in listed.items():
                if entry.source == pb.ShardList.DRAWN:
                    await node.let_go(table)
                    await node.draw(shard_of(entry.shard), entry.held.history)
                elif entry.source == pb.ShardList.COPIED:
                    standing.is_whole = False
                    await node.let_go(table)
                    self._copied[entry.held.history] = _Copy(shard_of(entry.shard), entry.held)

    async def _take_copy(self, part: pb.ShardCopy) -> None:
        if part.WhichOneof("what") == "is_last":
            async with self._node.admin:
                made = [await self._node.run(copy.whole) for copy in self._copied.values()]
                await self._node.use_copies(made)
            self._node.counters["copied_shards"] += len(made)
            self._copied = {}
            return
        if part.history not in self._copied:
            raise InternalError(f"a copy must be of a shard on the list; got one of {part.history}")
        copy = self._copied[part.history]
        if part.HasField("rows"):
            await self._node.run(copy.add, part.state, part.rows.values)
        else:
            copy.answer(part.answer)

    def _life(self, history: str) -> Life:
        for life in self._node.lives:
            if life.name == history:
                return life
        raise InternalError(f"a replica must have been told of a history; got {history}")


class _Copy:
    """A shard that is being copied."""

    def __init__(self, spec: ShardSpec, held: pb.HeldShard) -> None:
        self._spec, self._held = spec, held
        self._states: dict[str, Tensor] = {}  # "": the rows
        self._num_rows: dict[str, int] = {}  # that have come
        self._kept: dict[int, Kept] = {}

    def add(self, state: str, values: pb.Tensor) -> None:
        """Add the next rows of a state."""
        rows = unpacked([values], "values")
        if state not in self._states:
            self._states[state] = torch.empty(self._spec.region.shape[0], *rows.shape[1:], dtype=rows.dtype)
        at = self._num_rows.get(state, 0)
        self._states[state][at : at + len(rows)] = rows
        self._num_rows[state] = at + len(rows)

    def answer(self, kept: pb.KeptAnswer) -> None:
        """Add a client's last answer."""
        has_any = kept.HasField("score_gradients")
        gradients = unpacked([kept.score_gradients], "score gradients") if has_any else None
        self._kept[kept.client] = Kept(kept.step, kept.version, gradients)

    def whole(self) -> Held:
        """Return the shard."""
        if "" not in self._states or set(self._num_rows.values()) != {self._spec.region.shape[0]}:
            raise ConsistencyError(
                f'a copy must have all {self._spec.region.shape[0]} rows; that of table "{self._spec.table.name}" has '
                f"{self._num_rows}"
            )
        states = dict(self._states)
        shard = Shard(self._spec, TableState(weight=states.pop(""), optimizer=states), self._held.version)
        steps = {client: kept.step for client, kept in self._kept.items()}
        return Held(shard, self._held.history, steps, self._kept, self._held.edit, is_saved=True)


def _has_failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None

"""The primary's side of a pair: keeps a link to the replica, and brings it up to date whenever it is there again."""

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from mfdist.errors import CheckpointError, ConfigError, ConsistencyError, MfdistError, UnavailableError
from mfdist.table_server import epoch as epochs
from mfdist.table_server.channel import client_channel
from mfdist.table_server.codec import blocks, packed_message
from mfdist.table_server.config import ReplicationConfig
from mfdist.table_server.life import Life
from mfdist.table_server.messages import shard_message
from mfdist.table_server.node import Node
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.status import error_of

_PAUSE_S = 0.5  # between attempts to reach the replica
_OUTBOX_BYTES = 32 << 20  # of copies and old pushes that wait to be sent; new pushes always find room
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))

_logger = logging.getLogger(__name__)


class Replicator:
    """Keeps the replica up to date while this server is the primary.

    Args:
        node: what the server holds.
        config: how it is reached; where it is, `node.standing` knows.

    Called on: the event loop.
    """

    def __init__(self, node: Node, config: ReplicationConfig) -> None:
        self._node, self._config = node, config
        self._said = ""  # why there is no replica, last

    async def run(self) -> None:
        """Link to the replica, again and again; runs until it is cancelled."""
        standing = self._node.standing
        while True:
            if standing.role == "primary" and (peer := standing.peer):
                try:
                    async with client_channel(peer, self._config, _OPTIONS) as channel:
                        await self._link(channel, peer)
                except ConfigError as error:  # of a certificate or a token that is wrong now
                    self._tell(error, peer)
            await asyncio.sleep(_PAUSE_S)

    async def _link(self, channel: grpc.aio.Channel, peer: str) -> None:
        standing = self._node.standing
        link = Link(self._node, channel, peer, self._config.timeout_s)
        try:
            await link.run()
        except MfdistError as error:
            self._tell(error, peer)
        finally:
            standing.link = None
            link.fail(UnavailableError(f"the replica {peer} was lost"))
        await self._go_on()
        link.close()

    def _tell(self, error: MfdistError, peer: str) -> None:
        if self._node.standing.is_in_sync or str(error) != self._said:  # once, not at each attempt
            self._said = str(error)
            _logger.warning("no replica: %s", error, extra={"fields": {"peer": peer}})

    async def _go_on(self) -> None:
        """Go on alone, once that can be remembered: the log tells of a disk that is full."""
        while True:
            try:
                await self._node.standing.lost_replica()
            except CheckpointError:
                await asyncio.sleep(_PAUSE_S)
            else:
                return


class Link:
    """One connection to the replica, from the greeting on."""

    def __init__(self, node: Node, channel: grpc.aio.Channel, peer: str, timeout_s: float) -> None:
        self._node = node
        self._stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
        self._peer, self._timeout_s = peer, timeout_s
        self._number = self._acknowledged = 0
        self._outbox: deque[pb.ReplicateRequest] = deque()
        self._outbox_bytes = 0
        self._on_acknowledged: deque[tuple[int, Callable[[], None]]] = deque()
        self._news = asyncio.Event()  # something is sent, acknowledged or lost
        self._theirs: dict[str, pb.HeldShard] = {}  # by history, as the replica said first
        #: life → what waits for older pushes, which are being read from the log; None: it goes on as it comes.
        self._streaming: dict[str, list[Callable[[], None]] | None] = {}
        self._failure: MfdistError | None = None
        self._is_closed = asyncio.Event()
        self._waiting: set[asyncio.Future[None]] = set()

    async def run(self) -> None:
        """Bring the replica up to date and keep it so, until it is lost or has taken over.

        Raises:
            MfdistError: why it is lost.
        """
        standing = self._node.standing
        self._send(pb.ReplicateRequest(hello=pb.Hello(epoch=standing.epoch, server_id=self._node.store.server_id)))
        replies = self._stub.Replicate(self._requests())
        tasks: list[asyncio.Task[None]] = []
        try:
            holding = (await self._read(replies)).holding
            if holding.epoch > standing.epoch:
                await standing.step_down(holding.epoch)
                return
            if epochs.who(holding.server_id) == epochs.who(self._node.store.server_id):
                raise ConfigError(f"servers of a pair must be told apart; got {holding.server_id} from {self._peer}")
            self._theirs = {held.history: held for held in holding.shards}
            doing = (self._keep_reading(replies), self._first_sync(), self._beat(), self._until_failed())
            tasks = [asyncio.ensure_future(one) for one in doing]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        except grpc.RpcError as error:
            raise error_of(error, self._peer) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            replies.cancel()

    def fail(self, why: MfdistError) -> None:
        """Say that the replica is lost; nobody is told of anything it should have until `close`."""
        if self._failure is None:
            self._failure = why
            self._tell()

    def close(self) -> None:
        """Let everyone go who waits for the replica: the server goes on alone."""
        self._is_closed.set()
        for waiting in list(self._waiting):
            _finish(waiting)

    # As `standing.Replica`.

    def forward(self, life: str, version: int, client: int, payload: list[bytes]) -> None:
        """Send a push that is on this server's disk, unless it will be read from there."""
        if life in self._streaming:
            self._in_turn(life, lambda: self._send_push(life, version, client, payload))

    def wrote(self, life: str, request: pb.WriteRequest, at: int, edit: str) -> Awaitable[None]:
        """Send what was written; return what is done once the replica has it or is lost."""
        done = asyncio.get_running_loop().create_future()
        if self._failure is None and life in self._streaming:
            self._waiting.add(done)
            done.add_done_callback(self._waiting.discard)
            write = pb.AppliedWrite(history=life, edit=edit, at=at, request=request)
            told = functools.partial(_finish, done)
            self._in_turn(life, lambda: self._send(pb.ReplicateRequest(write=write), told))
        else:  # it will be copied
            done.set_result(None)
        return done

    async def sync(self) -> None:
        """Let it have the shards that are new or replaced, or lose it. Holding the node's `admin`."""
        try:
            await self._sync()
        except MfdistError as error:
            self.fail(error)
            await self._is_closed.wait()

    # Bringing it up to date.

    async def _first_sync(self) -> None:
        async with self._node.admin:
            self._node.standing.link = self
            await self._sync()
        _logger.info("in sync with the replica", extra={"fields": {"peer": self._peer}})

    async def _sync(self) -> None:
        node, standing = self._node, self._node.standing
        lives, sources, versions = node.lives, dict[str, pb.ShardList.Source](), dict[str, int]()
        async with contextlib.AsyncExitStack() as stack:
            for life in lives:
                sources[life.name] = self._source(life)
                if sources[life.name] == pb.ShardList.COPIED:
                    await stack.enter_async_context(life.updates.changing)
                versions[life.name] = life.shard.version
            entries = [
                pb.ShardList.Entry(
                    shard=shard_message(life.shard.spec),
                    held=pb.HeldShard(history=life.name, version=versions[life.name], edit=life.edit),
                    source=sources[life.name],
                )
                for life in lives
            ]
            self._send(pb.ReplicateRequest(shards=pb.ShardList(entries=entries, num_clients=standing.num_clients)))
            copied = [life for life in lives if sources[life.name] == pb.ShardList.COPIED]
            for life in copied:
                await self._copy(life)
            if copied:
                self._send(pb.ReplicateRequest(copy=pb.ShardCopy(is_last=True)))
            new = [life for life in lives if life.name not in self._streaming]
            self._streaming = {life.name: self._streaming.get(life.name, []) for life in lives}
        await self._until_acknowledged(self._number)
        for life in new:
            # From here on a push is either in the log, or forwarded when it is.
            match sources[life.name]:
                case pb.ShardList.KEPT:
                    version = self._theirs[life.name].version
                case pb.ShardList.COPIED:
                    version = versions[life.name]
                case _:
                    version = 0
            standing.replicated(life.name, version)
            await self._catch_up(life, version)
        await self._until_acknowledged(self._number)
        standing.is_in_sync = True  # before it is told: it may take over from then on
        epoch = standing.epoch
        self._send(pb.ReplicateRequest(settled=pb.Settled(epoch=epoch, rows_since=standing.rows_since)))
        await self._until_acknowledged(self._number)
        standing.is_settled = standing.is_in_sync and standing.epoch == epoch

    def _source(self, life: Life) -> "pb.ShardList.Source":
        """Return where the replica gets a shard from."""
        if life.name in self._streaming:
            return pb.ShardList.KEPT
        held = self._theirs.get(life.name)
        if held is not None and held.edit == life.edit:
            if held.version > life.shard.version:
                raise ConsistencyError(
                    f"a replica must not have more than its primary; {self._peer} has {held.version} updates of table "
                    f'"{life.shard.name}", this server {life.shard.version}: its disk lost some; stop it, and let the '
                    "replica take over"
                )
            if held.version >= (life.base or 0):
                return pb.ShardList.KEPT
        is_drawn = life.base is None and not life.edit and held is None
        return pb.ShardList.DRAWN if is_drawn else pb.ShardList.COPIED

    async def _copy(self, life: Life) -> None:
        """Send rows, states and last answers of a shard, which does not change meanwhile."""
        state = life.shard.state()
        for name, tensor in {"": state.weight, **state.optimizer}.items():
            width = tensor.element_size() * (tensor.shape[1] if tensor.ndim == 2 else 1)
            for part in blocks(len(tensor), width):
                rows = pb.Rows(values=await self._node.run(packed_message, tensor[part]), version=life.shard.version)
                await self._room()
                self._send(pb.ReplicateRequest(copy=pb.ShardCopy(history=life.name, state=name, rows=rows)))
        for client, kept in life.updates.kept.items():
            answer = pb.KeptAnswer(client=client, step=kept.step, version=kept.version)
            if kept.score_gradients is not None:
                answer.score_gradients.CopyFrom(packed_message(kept.score_gradients))
            self._send(pb.ReplicateRequest(copy=pb.ShardCopy(history=life.name, answer=answer)))

    async def _catch_up(self, life: Life, version: int) -> None:
        """Send the pushes that are in the log and later than a version, then those that waited for them."""
        logged = self._node.store.pushes(life.name, version)
        while (one := await self._node.run(next, logged, None)) is not None:
            logged_version, messages = one
            await self._room()
            client = pb.PushRequest.FromString(messages[0]).client
            self._send_push(life.name, logged_version, client, messages)
        held_back = self._streaming[life.name] or []
        self._streaming[life.name] = None
        for send in held_back:
            send()

    def _in_turn(self, life: str, send: Callable[[], None]) -> None:
        held_back = self._streaming[life]
        if held_back is None:
            send()
        else:
            held_back.append(send)

    # Sending and hearing.

    def _send(self, request: pb.ReplicateRequest, on_acknowledged: Callable[[], None] | None = None) -> None:
        self._number += 1
        request.number = self._number
        if on_acknowledged is not None:
            self._on_acknowledged.append((self._number, on_acknowledged))
        self._outbox.append(request)
        self._outbox_bytes += request.ByteSize()
        self._tell()

    def _send_push(self, life: str, version: int, client: int, messages: list[bytes]) -> None:
        for message in messages[:-1]:
            self._send(pb.ReplicateRequest(push=pb.LoggedPush(history=life, version=version, message=message)))
        last = pb.LoggedPush(history=life, version=version, message=messages[-1], is_last=True)
        standing = self._node.standing
        self._send(pb.ReplicateRequest(push=last), lambda: standing.replicated(life, version, client))

    async def _requests(self) -> AsyncIterator[pb.ReplicateRequest]:
        while True:
            await self._until(lambda: len(self._outbox) > 0)
            request = self._outbox.popleft()
            self._outbox_bytes -= request.ByteSize()
            self._tell()
            yield request

    async def _room(self) -> None:
        """Wait until there is room for what need not be sent at once."""
        await self._until(lambda: self._outbox_bytes < _OUTBOX_BYTES)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._timeout_s / 4)
            self._send(pb.ReplicateRequest())

    async def _read(self, replies: Any) -> pb.ReplicateReply:
        """Return the replica's next answer; it has one every quarter of its time."""
        try:
            reply = await asyncio.wait_for(replies.read(), self._timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"the replica {self._peer} must answer within {self._timeout_s:g} s; it did not; see whether it runs"
            ) from None
        if not isinstance(reply, pb.ReplicateReply):
            raise UnavailableError(f"the replica {self._peer} must go on following; it ended that")
        return reply

    async def _keep_reading(self, replies: Any) -> None:
        while True:
            reply = await self._read(replies)
            self._acknowledged = reply.number
            while self._on_acknowledged and self._on_acknowledged[0][0] <= reply.number:
                self._on_acknowledged.popleft()[1]()
            self._tell()

    async def _until_acknowledged(self, number: int) -> None:
        await self._until(lambda: self._acknowledged >= number)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds.

        Raises:
            MfdistError: the replica was lost.
        """
        while not holds() and self._failure is None:
            await self._news.wait()
        if self._failure is not None:
            raise self._failure

    async def _until_failed(self) -> None:
        await self._until(lambda: False)

    def _tell(self) -> None:
        told, self._news = self._news, asyncio.Event()
        told.set()


def _finish(done: "asyncio.Future[None]") -> None:
    if not done.done():
        done.set_result(None)

"""The RPCs of proto/table_v1.proto over a `Node`. What each does is written there."""

import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeAlias

import grpc
from torch import Tensor

from mfdist import __version__
from mfdist.errors import ConfigError
from mfdist.table_server.calls import Refusal
from mfdist.table_server.codec import (
    MAX_MESSAGE_BYTES,
    blocks,
    packed,
    packed_message,
    row_bytes,
    sums_dtype_of,
    unpacked,
)
from mfdist.table_server.contribution import contribution_of, lookups_of, push_of, step_of
from mfdist.table_server.frames import Frame
from mfdist.table_server.in_turn import in_turn
from mfdist.table_server.life import Life
from mfdist.table_server.messages import optimizer_of, shard_message, shard_of
from mfdist.table_server.metrics import Metrics
from mfdist.table_server.node import Node
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceServicer
from mfdist.table_server.shard import Shard

Context: TypeAlias = grpc.aio.ServicerContext

_SMALL_BYTES = 8 << 20  # of rows, read in about 0.15 ms from a cache
_HEAD_BYTES = 1 << 10  # of a message, beside its tensors' data, at most
_ROLES = {"single": pb.ROLE_UNSPECIFIED, "primary": pb.PRIMARY, "replica": pb.REPLICA}


class TableService(TableServiceServicer):
    """See the protocol; errors are raised as `mfdist.errors` and travel as statuses.

    Args:
        node: what the server holds.
        metrics: what `Stats` tells beside the node's own counts.
        max_push_bytes: of one push.
    """

    def __init__(self, node: Node, metrics: Metrics, *, max_push_bytes: int = 1 << 30) -> None:
        self._node = node
        self._metrics = metrics
        self._max_push_bytes = max_push_bytes
        self._count = node.counters

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        """Return what this server is."""
        node, standing = self._node, self._node.standing
        return pb.DescribeReply(
            server_id=node.store.server_id,
            epoch=standing.epoch,
            version=__version__,
            shards=[_status(life) for life in node.lives],
            is_draining=node.is_draining,
            role=_ROLES[standing.role],
            peer=standing.peer,
            is_in_sync=standing.is_whole if standing.role == "replica" else standing.is_in_sync,
        )

    async def Create(self, request: pb.CreateRequest, context: Context) -> pb.CreateReply:
        """Make a shard."""
        life, was_there = await self._node.create(shard_of(request.shard))
        return pb.CreateReply(status=_status(life), was_there=was_there)

    async def Train(self, request: pb.TrainRequest, context: Context) -> pb.TrainReply:
        """Change how a shard is trained."""
        optimizer = optimizer_of(request.optimizer) if request.HasField("optimizer") else None
        return pb.TrainReply(status=_status(await self._node.train(request.table, optimizer)))

    async def Drop(self, request: pb.DropRequest, context: Context) -> pb.DropReply:
        """Forget a table."""
        return pb.DropReply(was_there=await self._node.drop(request.table))

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        """Let a client take part."""
        await self._node.join(request.client, request.num_clients, request.session, request.seen_epoch)
        steps = {life.shard.name: life.updates.done(request.client) for life in self._node.lives}
        held = {life.shard.name: life.updates.held(request.client) for life in self._node.lives}
        is_asynchronous = self._node.config.consistency == "asynchronous"
        standing = self._node.standing
        return pb.JoinReply(
            epoch=standing.epoch,
            steps=steps,
            is_asynchronous=is_asynchronous,
            rows_since=standing.rows_since,
            held_steps=held,
        )

    async def Lookup(self, request_iterator: AsyncIterator[Frame], context: Context) -> AsyncIterator[bytes]:
        """Return sums, block by block; those of the next blocks are made while one is on its way."""
        first: pb.LookupRequest | None = None

        async def answer(request: Frame) -> bytes:
            nonlocal first
            if first is None:
                first = request.head
                await self._reached(first, context)
            return await self._looked_up(first, request)

        async with contextlib.aclosing(in_turn(request_iterator, answer)) as replies:
            async for reply in replies:
                yield reply

    async def LookupOnce(self, request: Frame, context: Context) -> bytes:
        """Return the sums of a lookup that is one message."""
        await self._reached(request.head, context)
        return await self._looked_up(request.head, request)

    async def Gather(self, request: pb.GatherRequest, context: Context) -> AsyncIterator[pb.Rows]:
        """Return rows, block by block, all of one version."""
        updates = self._node.life(request.table).updates
        await updates.reached(request.min_version, self._wait_s(context), self._node.standing.num_clients)
        row_ids = unpacked([request.row_ids], "row_ids") if request.HasField("row_ids") else None
        async with updates.gate.reading():
            version = updates.shard.version
            values = await self._node.run(updates.shard.gather, row_ids, request.state)
        await updates.on_disk(version)
        width = values.element_size() * (values.shape[1] if values.ndim == 2 else 1)
        for part in blocks(len(values), width):
            message = await self._node.run(packed_message, values[part])
            self._node.row_hits[request.table] += part.stop - part.start
            self._count["reply_bytes"] += len(message.data)
            yield pb.Rows(values=message, version=version)

    async def Push(
        self, request_iterator: AsyncIterator[Frame], context: Context
    ) -> AsyncIterator[pb.PushReply | bytes]:
        """Take a push in; return the scores' gradients, and, once it is on disk, say so."""
        messages = await self._received(request_iterator)
        first, node = messages[0].head, self._node
        self._count["pushes"] += 1
        if first.is_frozen:
            updates = node.life(first.table).updates
            contribution = await node.run(contribution_of, messages)
            if "lookups" not in messages[0].parts:
                raise ConfigError(
                    f'a push to frozen rows must hold lookups; got gradients of rows for table "{first.table}", which '
                    "nothing would take; push without is_frozen, or lookups"
                )
            async with updates.gate.reading():
                gradients = await node.run(updates.shard.score_gradients, contribution)
            async for reply in self._gradients(gradients):
                yield reply
            return
        epoch = first.epoch
        node.standing.check_client(first.client, first.session, epoch)
        updates = (await node.life_to_push_to(first.table)).updates
        push = await node.run(push_of, messages)
        assert push.contribution is not None, "steps without one come by Step"
        await node.run(updates.shard.check, push.contribution)
        node.row_hits[first.table] += push.contribution.lookups.row_ids.numel()
        del messages
        pushing = updates.push(push, node.standing.num_clients, self._wait_s(context))
        answer = await node.standing.within(epoch, pushing)
        self._count["known_pushes"] += answer.was_known
        if answer.score_gradients is not None:
            async for reply in self._gradients(answer.score_gradients):
                yield reply
        await node.standing.within(epoch, answer.on_disk)
        yield pb.PushReply(acknowledged=pb.Acknowledged(step=push.step, was_known=answer.was_known))

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepReply:
        """Take part in a step without a push."""
        node, standing = self._node, self._node.standing
        standing.check_client(request.client, request.session, request.epoch)
        updates = (await node.life_to_push_to(request.table)).updates
        updates.shard.trained()
        pushing = updates.push(step_of(request), standing.num_clients, self._wait_s(context))
        answer = await standing.within(request.epoch, pushing)
        await standing.within(request.epoch, answer.on_disk)
        return pb.StepReply(was_known=answer.was_known)

    async def Barrier(self, request: pb.BarrierRequest, context: Context) -> pb.BarrierReply:
        """Wait for a table's update."""
        updates = self._node.life(request.table).updates
        await updates.reached(request.version, self._wait_s(context), self._node.standing.num_clients)
        version = updates.shard.version
        await updates.on_disk(version)
        return pb.BarrierReply(version=version)

    async def Write(self, request_iterator: AsyncIterator[pb.WriteRequest], context: Context) -> pb.WriteReply:
        """Replace rows."""
        node = self._node
        node.standing.check_primary()
        first, at = None, 0
        async for request in request_iterator:
            if first is None:
                first, version = request, request.version if request.HasField("version") else None
            request.state = first.state
            request.ClearField("version")  # it is set last
            at += await node.write(node.life(first.table), request, at, token_hex(4))
        if first is None:
            raise ConfigError("a write must hold at least one message; got none")
        if version is not None:
            await node.write(node.life(first.table), pb.WriteRequest(version=version), at, token_hex(4))
        return pb.WriteReply()

    async def Save(self, request: pb.SaveRequest, context: Context) -> pb.SaveReply:
        """Save all shards."""
        if not request.directory:
            info = await self._node.checkpoint()
        else:
            directory = Path(request.directory)
            info = await self._node.save(directory, request.step, request.rank, request.world_size, request.meeting)
        return pb.SaveReply(step=info.step, written_bytes=info.written_bytes)

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.LoadReply:
        """Take all shards from a checkpoint."""
        step = request.step if request.HasField("step") else None
        loaded = await self._node.load(Path(request.directory), step)
        return pb.LoadReply(step=loaded, epoch=self._node.standing.epoch)

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsReply:
        """Return counters."""
        counters = {**self._count, **self._metrics.samples()}
        return pb.StatsReply(counters=counters, row_hits=self._node.row_hits)

    async def Promote(self, request: pb.PromoteRequest, context: Context) -> pb.PromoteReply:
        """Take over from the primary."""
        return pb.PromoteReply(epoch=await self._node.follower.take_over(request.seen_epoch))

    async def Replicate(
        self, request_iterator: AsyncIterator[pb.ReplicateRequest], context: Context
    ) -> AsyncIterator[pb.ReplicateReply]:
        """Follow the primary."""
        async with contextlib.aclosing(self._node.follower.follow(request_iterator)) as replies:
            async for reply in replies:
                yield reply

    async def _reached(self, first: pb.LookupRequest, context: Context) -> None:
        """Wait for the updates that a lookup must see."""
        updates = self._node.life(first.table).updates
        await updates.reached(first.min_version, self._wait_s(context), self._node.standing.num_clients)

    async def _looked_up(self, first: pb.LookupRequest, request: Frame) -> bytes:
        """Return the answer to one message of a lookup, once what it shows is on disk."""
        updates = self._node.life(first.table).updates
        async with updates.gate.reading():
            version = updates.shard.version
            asked = (updates.shard, first, request, version)
            is_small = _is_small(updates.shard, request)
            reply: bytes = _sums(*asked) if is_small else await self._node.run(_sums, *asked)
        self._node.row_hits[first.table] += math.prod(request.part("lookups").part("row_ids").head.shape)
        self._count["lookup_blocks"] += 1
        self._count["reply_bytes"] += len(reply)
        await updates.on_disk(version)
        return reply

    async def _received(self, requests: AsyncIterator[Frame]) -> list[Frame]:
        """Return all messages of a push, once the last has come."""
        messages: list[Frame] = []
        size = 0
        async for frame in requests:
            message = frame.head
            if message.sequence != len(messages):
                raise ConfigError(
                    f"the messages of a push count from 0 without a gap; got {message.sequence} after {len(messages)} "
                    "of them; send the push again"
                )
            size += frame.num_bytes
            if size > self._max_push_bytes:
                raise Refusal(
                    "size",
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"a push must be at most {self._max_push_bytes} bytes; got more from client {message.client}; "
                    "push fewer tokens at a time",
                )
            messages.append(frame)
            if message.is_last:
                return messages
        raise ConfigError(f"a push must end with its last message; got {len(messages)} and no last one; send it again")

    async def _gradients(self, gradients: Any) -> AsyncIterator[bytes]:
        width = gradients.element_size() * (gradients.shape[1] if gradients.ndim == 2 else 1)
        for part in blocks(len(gradients), width):
            yield await self._node.run(_gradient_reply, gradients[part])

    def _wait_s(self, context: Context) -> float:
        """Return how long to wait for others: a little less than the caller does, who then learns who is late."""
        remaining = context.time_remaining()
        limit = self._node.config.wait_s
        return limit if remaining is None else min(limit, max(0.05, 0.9 * remaining))


def _status(life: Life) -> pb.ShardStatus:
    shard = life.shard
    return pb.ShardStatus(shard=shard_message(shard.spec), version=shard.version, num_bytes=shard.num_bytes)


def _is_small(shard: Shard, request: Frame) -> bool:
    """Return whether the sums that a message asks for are sooner made than a thread is asked to."""
    lookups = request.part("lookups")
    num_rows = math.prod(max(1, size) for size in lookups.part("row_ids").head.shape) + lookups.head.num_tokens
    return bool(num_rows * shard.rows.shape[1] * shard.rows.element_size() <= _SMALL_BYTES)


def _sums(shard: Shard, first: pb.LookupRequest, request: Frame, version: int) -> bytes:
    dtype = sums_dtype_of(first.reply_dtype, "reply_dtype") if first.reply_dtype else shard.spec.table.dtype
    lookups = lookups_of([request.part("lookups")], first.code_stride, first.first_slot)
    # A few bytes can ask for any number of sums, and all would have to lie in memory.
    if (num_bytes := lookups.length * row_bytes(shard.rows.shape[1], dtype)) > MAX_MESSAGE_BYTES - _HEAD_BYTES:
        raise ConfigError(
            f"the sums of one message must fit into one of {MAX_MESSAGE_BYTES} bytes; got {lookups.length} tokens, "
            f"{num_bytes} bytes; send them in more messages"
        )
    return Frame(pb.LookupReply(version=version), {"sums": packed(shard.lookup(lookups), dtype)}).serialized()


def _gradient_reply(gradients: Tensor) -> bytes:
    return Frame(pb.PushReply(), {"score_gradients": packed(gradients)}).serialized()

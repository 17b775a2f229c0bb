"""A table whose rows lie on table servers; the traffic is hidden in its lookup."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mfdist.errors import ConfigError, ConsistencyError, InternalError
from mfdist.optim import RowOptimizer
from mfdist.sharding.table_plan import TablePlan
from mfdist.spec import Region
from mfdist.table import Table
from mfdist.table_server.codec import SUMS_BYTES, Joining, blocks, dtype_code, packed, packed_message, unpacked
from mfdist.table_server.connection import TableServers, gathered, sending
from mfdist.table_server.frames import Frame
from mfdist.table_server.messages import ShardSpec, optimizer_message, shard_message
from mfdist.table_server.owner import Owner
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.routing import Part, cut, joined_score_gradients, joined_sums, parts_of
from mfdist.table_server.shard import Lookups
from mfdist.tables.initial_rows import new_seed

_NOWHERE = Region(rows=(0, 0), columns=(0, 0))


class RemoteTable(Table):
    """A table on servers. They sum, so one row of width D a token comes back; they update rows in each backward.

    It is made on the servers by the first client that names it; others find it there. Its `weight` has no rows. Until
    it is fused its rows are frozen, and backward gives gradients to the scores alone.

    Where several clients train it, each step is one update of all their pushes, and every client must take part: look
    up and go backward as often as the others. Each one's loss is taken to be the mean over its tokens, as DDP takes it.

    Args:
        plan: its owners are the servers; every kind but replicated.
        servers: which hold it.
        std: standard deviation of the rows' normal initialisation.
        seed: of the rows' first values; by default a new one, which must be the same on all clients.
        fuse: trains the rows; see `Table.fuse`.

    Raises:
        ConfigError: the plan does not fit the servers, or the rule needs whole rows and the plan cuts columns.
        ConsistencyError: a server holds another table of this name.
        UnavailableError: a server does not answer.
    """

    seed: int

    def __init__(
        self,
        plan: TablePlan,
        servers: TableServers,
        *,
        std: float = 0.02,
        seed: int | None = None,
        fuse: RowOptimizer | None = None,
    ) -> None:
        super().__init__(plan.spec)
        if plan.kind == "replicated" or max(plan.owners) >= len(servers):
            raise ConfigError(
                f"a table on servers is cut among them; got the plan {plan.kind} with owners {plan.owners} for "
                f'{len(servers)} servers and table "{plan.name}"; plan it for these servers'
            )
        self.plan, self.servers, self.std = plan, servers, std
        self.seed = new_seed() if seed is None else seed
        self.weight = nn.Parameter(torch.empty(0, plan.row_dim, dtype=plan.dtype))
        self._ahead: tuple[Tensor, Tensor, int, Any] | None = None
        self._num_steps = 0
        servers.wait(self._create(fuse))
        if fuse is not None:
            super().fuse(fuse)
        self.resume()

    @property
    def region(self) -> Region:
        """Return the part that this process holds: nothing."""
        return _NOWHERE

    @property
    def num_updates(self) -> int:
        """Return how many updates this client has taken part in, those before it was made included."""
        return self._num_steps

    def fuse(self, optimizer: RowOptimizer | None) -> Self:
        """Train the rows on the servers in every backward from now on, or, given None, freeze them; see `Table.fuse`.

        Called on: all clients, with the same settings.
        """
        self.servers.flush()
        self.servers.wait(self._train(optimizer))
        super().fuse(optimizer)
        self.resume()
        return self

    def resume(self) -> None:
        """Go on from the number of updates that the servers have, as after `TableServers.load`; see also `joins_later`.

        Raises:
            ConsistencyError: they have not had the same; load a checkpoint.
        """
        if self.servers.joins_later:
            return
        self.servers.wait(gathered([self._owner(shard.owner).join(is_anew=True) for shard in self.plan.shards]))
        steps = [self._owner(shard.owner).steps.get(self.spec.name, 0) for shard in self.plan.shards]
        if len(set(steps)) > 1:
            raise ConsistencyError(
                f'the servers of table "{self.spec.name}" must have had the same updates; they have had '
                f"{', '.join(map(str, steps))}: a client died in the middle of a step; load a checkpoint"
            )
        self._num_steps = steps[0]
        if self.row_state is not None:
            self.row_state.num_updates = steps[0]

    def prefetch(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> None:
        """Begin a lookup that the next call with these very tensors takes over.

        Of rows that are trained synchronously it is used only where they have had no update in between.
        """
        parts = parts_of(self.plan, row_ids.cpu(), scores.detach().cpu(), code_stride)
        self._ahead = (row_ids, scores, self._num_steps, self.servers.submit(self._sums(parts)))

    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the lookup; see `Table.forward`.

        Raises:
            RowIdError: an id lies outside the table.
            UnavailableError: a server does not answer before the deadline, or another client is late; it is named.
            MfdistError: what became of an earlier push that a server did not take.
        """
        kind = scores.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.spec.dtype
        state = self.row_state
        is_training = torch.is_grad_enabled() and (state is not None or scores.requires_grad)
        anchor = None if state is None or not is_training else state.anchor
        out: Tensor = _Lookup.apply(scores, anchor, row_ids, code_stride, self)  # type: ignore[no-untyped-call]
        return out.to(dtype)

    # Whole tables: for tests, tools and small ones.

    def rows(self) -> Tensor:
        """Return all rows [R, D], as after this client's last update."""
        return self.servers.wait(self._gathered(""))

    def states(self) -> dict[str, Tensor]:
        """Return all values of the row optimiser's states by name, [R] or [R, D]."""
        names = [] if self.row_state is None else list(self.row_state.tensors)
        return {name: self.servers.wait(self._gathered(name)) for name in names}

    @torch.no_grad()
    def load_rows(self, rows: Tensor) -> None:
        """Replace all rows by [R, D]; on disk before any later push is acknowledged, and after `TableServers.save`.

        Called on: one client, while no other uses the table.
        """
        if rows.shape != (self.spec.num_rows, self.spec.row_dim):
            raise ConfigError(
                f'rows of table "{self.spec.name}" must be {[self.spec.num_rows, self.spec.row_dim]}; got '
                f"{list(rows.shape)}"
            )
        self.servers.flush()
        self.servers.wait(self._write(rows.to(self.spec.dtype)))

    def extra_repr(self) -> str:
        """Return the spec, the kind of sharding and the servers."""
        return f"{super().extra_repr()}, {self.plan.kind} on {', '.join(self.servers.addresses)}"

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be copied or pickled: two handles that push as one client would contradict each other."""
        raise TypeError(
            f'a remote table is this process\'s hold on servers and is not copied; got "{self.spec.name}"; make '
            "another RemoteTable with a connection of its own"
        )

    # On the event loop.

    def _owner(self, index: int) -> Owner:
        return self.servers.owner(index)

    async def _create(self, optimizer: RowOptimizer | None) -> None:
        async def create(owner: int, region: Region) -> None:
            spec = ShardSpec(table=self.spec, region=region, optimizer=optimizer, std=self.std, seed=self.seed)
            await self._owner(owner).once("Create", pb.CreateRequest(shard=shard_message(spec)))

        await gathered([create(shard.owner, shard.region) for shard in self.plan.shards])

    async def _train(self, optimizer: RowOptimizer | None) -> None:
        request = pb.TrainRequest(
            table=self.spec.name, optimizer=None if optimizer is None else optimizer_message(optimizer)
        )
        await gathered([self._owner(shard.owner).once("Train", request) for shard in self.plan.shards])

    async def _sums(self, parts: Sequence[Part]) -> list[Tensor]:
        return await gathered([self._sums_of(part) for part in parts])

    async def _sums_of(self, part: Part) -> Tensor:
        server, requests = self._owner(part.server), self.lookup_messages(part)
        requests[0].head.min_version = 0 if server.is_asynchronous else self._num_steps

        async def call(left_s: float) -> Tensor:
            sums = Joining(part.lookups.length, "sums")
            if len(requests) == 1:
                reply = await server.stub.LookupOnce(requests[0], timeout=left_s)
                sums.add(reply.part("sums"))
                return sums.joined()
            async for reply in server.stub.Lookup(sending(requests), timeout=left_s):
                sums.add(reply.part("sums"))
            return sums.joined()

        return (await server.repeated(call)).to(self.spec.dtype)

    def lookup_messages(self, part: Part) -> list[Frame]:
        """Return the messages that ask a server for its part of a lookup."""
        item_bytes = max(part.region.shape[1] * self.spec.dtype.itemsize, _item_bytes(part.lookups))
        cuts = cut(part.lookups, blocks(part.lookups.length, item_bytes, SUMS_BYTES))
        requests = [Frame(pb.LookupRequest(), {"lookups": _frame(piece)}) for _, piece in cuts]
        first: pb.LookupRequest = requests[0].head
        first.table, first.code_stride, first.first_slot = (
            self.spec.name,
            part.lookups.code_stride,
            part.lookups.first_slot,
        )
        first.reply_dtype = dtype_code(self.plan.forward_dtype)
        return requests

    async def _push(self, parts: Sequence[Part], grad_output: Tensor, lr: float) -> list[Tensor]:
        """Push the gradient of a lookup's sums; return the scores' gradients, while the push goes on to disk."""
        self._num_steps += 1
        loop = asyncio.get_running_loop()
        gradients: list[asyncio.Future[Tensor]] = []
        for part in parts:
            requests = self._push_messages(part, grad_output)
            first = requests[0].head
            first.client, first.session, first.lr = self.servers.client, self.servers.session, lr
            first.step = self._num_steps
            gradients.append(loop.create_future())
            self.servers.keep(asyncio.ensure_future(self._pushed(part, requests, gradients[-1])))
        return await gathered(gradients)

    async def _pushed(self, part: Part, requests: Sequence[Frame], gradients: "asyncio.Future[Tensor]") -> None:
        """Push until it is acknowledged; the gradients are there earlier."""
        server = self._owner(part.server)

        async def call(left_s: float) -> None:
            requests[0].head.epoch = server.epoch
            received: list[Frame] = []
            async for reply in server.stub.Push(sending(requests), timeout=left_s):
                if reply.head.HasField("acknowledged"):
                    server.acknowledged[self.spec.name] = reply.head.acknowledged.step
                    if not gradients.done():
                        gradients.set_exception(_answered_too_late(self.spec.name, server))
                    return
                received.append(reply.part("score_gradients"))
                if _is_all(received, part.lookups) and not gradients.done():
                    gradients.set_result(unpacked(received, "score gradients"))
            raise InternalError(f"server {server.address} ended a push without acknowledging it")

        try:
            await server.joined()
            await server.repeated(call, before_again=server.join)
        except BaseException as error:
            if gradients.done():
                raise
            gradients.set_exception(error)

    async def _frozen(self, parts: Sequence[Part], grad_output: Tensor) -> list[Tensor]:
        async def asked(part: Part) -> Tensor:
            requests, server = self._push_messages(part, grad_output), self._owner(part.server)
            requests[0].head.is_frozen = True

            async def call(left_s: float) -> list[Frame]:
                replies = server.stub.Push(sending(requests), timeout=left_s)
                return [reply.part("score_gradients") async for reply in replies]

            return unpacked(await server.repeated(call), "score gradients")

        return await gathered([asked(part) for part in parts])

    def _push_messages(self, part: Part, grad_output: Tensor) -> list[Frame]:
        columns = slice(*part.region.columns)
        width = part.region.shape[1] * grad_output.element_size()
        requests: list[Frame] = []
        for run, piece in cut(part.lookups, blocks(part.lookups.length, width + _item_bytes(part.lookups))):
            gradient = packed(grad_output[run, columns], self.plan.backward_dtype)
            tensors = {"lookups": _frame(piece), "grad_output": gradient}
            # Sent again, a push must be the same, and its caller goes on before it is acknowledged.
            requests.append(Frame(pb.PushRequest(sequence=len(requests)), tensors).owning())
        first: pb.PushRequest = requests[0].head
        first.table, first.code_stride, first.first_slot = (
            self.spec.name,
            part.lookups.code_stride,
            part.lookups.first_slot,
        )
        requests[-1].head.is_last = True
        return requests

    async def _gathered(self, state: str) -> Tensor:
        async def gather(owner: int) -> Tensor:
            server = self._owner(owner)
            least = 0 if server.is_asynchronous else self._num_steps
            request = pb.GatherRequest(table=self.spec.name, state=state, min_version=least)

            async def call(left_s: float) -> list[pb.Tensor]:
                replies = server.stub.Gather(request, timeout=left_s)
                return [reply.values async for reply in replies]

            return unpacked(await server.repeated(call), "rows")

        shards = self.plan.shards
        parts = await gathered([gather(shard.owner) for shard in shards])
        shape = (self.spec.num_rows, self.spec.row_dim)[: parts[0].ndim]
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for shard, part in zip(shards, parts, strict=True):
            whole[tuple(slice(*bounds) for bounds in (shard.region.rows, shard.region.columns)[: part.ndim])] = part
        return whole

    async def _write(self, rows: Tensor) -> None:
        async def write(owner: int, region: Region) -> None:
            server, part = self._owner(owner), rows[slice(*region.rows), slice(*region.columns)]

            async def messages() -> AsyncIterator[pb.WriteRequest]:
                for run in blocks(len(part), part.shape[1] * part.element_size()):
                    yield pb.WriteRequest(values=packed_message(part[run]), table=self.spec.name)

            await server.repeated(lambda left_s: server.stub.Write(messages(), timeout=left_s))

        await gathered([write(shard.owner, shard.region) for shard in self.plan.shards])


class _Lookup(torch.autograd.Function):
    """The servers' lookup and update as autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, anchor: Tensor | None, row_ids: Tensor, code_stride: int, table: RemoteTable
    ) -> Tensor:
        servers, ahead = table.servers, table._ahead
        servers.raise_failed()
        parts = parts_of(table.plan, row_ids.cpu(), scores.detach().cpu(), code_stride)
        if ahead is not None and ahead[0] is row_ids and ahead[1] is scores and ahead[2] == table.num_updates:
            sums = ahead[3].result()
        else:
            sums = servers.wait(table._sums(parts))
        table._ahead = None
        # The count of updates is kept for autograd to see that there was none since.
        ctx.save_for_backward(scores, table.row_state and table.row_state.count)
        ctx.parts, ctx.table = parts, table
        return joined_sums(parts, sums, table.spec.row_dim).to(scores.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scores, _ = ctx.saved_tensors
        table, parts = ctx.table, ctx.parts
        servers, state = table.servers, table.row_state
        grad, number = grad_output.cpu(), servers.num_clients
        if state is None:
            made = servers.wait(table._frozen(parts, grad))
        else:
            # Scaled before it is summed, as the ranks of a sharded table do.
            made = servers.wait(table._push(parts, grad / number if number > 1 else grad, state.lr))
            state.count.add_(1)
        gradients = joined_score_gradients(parts, made, scores.shape).to(scores.device)
        if state is not None and number > 1:
            gradients = gradients * number
        return gradients, None, None, None, None


def _frame(lookups: Lookups) -> Frame:
    tensors = {"row_ids": packed(lookups.row_ids), "scores": packed(lookups.scores)}
    if lookups.tokens is None:
        return Frame(pb.Lookups(), tensors)
    return Frame(pb.Lookups(num_tokens=lookups.num_tokens), tensors | {"tokens": packed(lookups.tokens)})


def _item_bytes(lookups: Lookups) -> int:
    """Return the bytes of a token's lookups, on average where they are listed."""
    single = lookups.row_ids.element_size() + lookups.scores.element_size()
    number = lookups.row_ids.numel()
    if lookups.tokens is not None:
        single += lookups.tokens.element_size()
    return -(-number * single // max(1, lookups.length))


def _is_all(received: Sequence[Frame], lookups: Lookups) -> bool:
    num_received: int = sum(frame.head.shape[0] for frame in received)
    return num_received == lookups.row_ids.shape[0]


def _answered_too_late(table: str, server: Owner) -> ConsistencyError:
    return ConsistencyError(
        f'a push must be answered before the next; server {server.address} has had a later update of table "{table}"; '
        "another process pushes as this client; give each its own number"
    )

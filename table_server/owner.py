"""One owner of a plan as a client reaches it: a server, or a pair of them of which one is the primary.

Calls are safe to repeat, and are made again while the owner cannot be reached. Where the primary of a pair does not
answer, the client turns to the other one, and makes it the primary if nobody else has.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from mfdist.errors import ConfigError, ConsistencyError, MfdistError, NotPrimaryError, UnavailableError
from mfdist.table_server import epoch as epochs
from mfdist.table_server.channel import ChannelConfig, client_channel
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.rpcs import Rpcs
from mfdist.table_server.status import error_of, is_said

_T = TypeVar("_T")

_OPTIONS = (
    # A server that comes back is found within a second, not after a backoff of minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0


@dataclass(frozen=True)
class Membership:
    """As what a client joins: its number, how many there are, and what it drew when it started."""

    client: int
    num_clients: int
    session: int


@dataclass(frozen=True)
class _Copy:
    address: str
    channel: grpc.aio.Channel
    stub: Rpcs


class Owner:
    """One owner. Made and used on the client's event loop.

    Args:
        index: in the plan.
        addresses: of the server, or of both of a pair.
        member: as what to join.
        deadline_s: longest wait for an answer.
        failover_s: how long a primary may not answer before the other one is asked to take over.
        channel: how to reach it.
    """

    def __init__(
        self,
        index: int,
        addresses: Sequence[str],
        member: Membership,
        *,
        deadline_s: float,
        failover_s: float,
        channel: ChannelConfig | None,
    ) -> None:
        self.index = index
        self.epoch = 0
        self.is_asynchronous = False
        #: table → this client's steps, as the server had them when it was joined.
        self.steps: dict[str, int] = {}
        #: table → the last step of this client that was acknowledged.
        self.acknowledged: dict[str, int] = {}
        self._member, self._deadline_s, self._failover_s = member, deadline_s, failover_s
        self._channel = channel
        self._copies = [self._reached(address) for address in addresses]
        self._left: list[_Copy] = []  # whose calls may still be under way
        self._at = 0
        self._lost_at_s: float | None = None  # since when there is no primary
        self._primary_epoch = 0  # of the primary, when it was last looked for
        self._watching: asyncio.Task[None] | None = None
        self._joining, self._finding = asyncio.Lock(), asyncio.Lock()

    @property
    def address(self) -> str:
        """Return the address of the server that is asked now."""
        return self._copies[self._at].address

    @property
    def addresses(self) -> list[str]:
        """Return the addresses of all servers of the owner."""
        return [copy.address for copy in self._copies]

    @property
    def stub(self) -> Rpcs:
        """Return the RPCs of the server that is asked now."""
        return self._copies[self._at].stub

    async def connect(self) -> None:
        """Find the primary of a pair, or make one."""
        if len(self._copies) > 1:
            await self._again(lambda left_s: self._find_one())
            if self._watching is None:
                self._watching = asyncio.ensure_future(self._watch())

    async def move(self, addresses: Sequence[str]) -> None:
        """Reach the servers at other addresses from now on, those that have moved."""
        async with self._finding:
            for index, address in enumerate(addresses):
                if (left := self._copies[index]).address != address:
                    self._copies[index] = self._reached(address)
                    self._left.append(left)

    async def once(self, method: str, request: Any, *, of_any_epoch: bool = False) -> Any:
        """Return the answer of a unary RPC that may be repeated, by its name; see `repeated`."""
        return await self.repeated(
            lambda left_s: getattr(self.stub, method)(request, timeout=left_s), of_any_epoch=of_any_epoch
        )

    async def identities(self) -> list[tuple[str, str]]:
        """Return the address and the id of each server; of a pair, of those that answer."""
        if len(self._copies) == 1:
            return [(self.address, (await self.once("Describe", pb.DescribeRequest())).server_id)]
        seen = await asyncio.gather(*map(self._look, self._copies))
        return [(copy.address, reply.server_id) for copy, reply in zip(self._copies, seen, strict=True) if reply]

    async def join(self, *, is_anew: bool = False) -> None:
        """Become the client that this process is, and learn the server's epoch.

        Args:
            is_anew: whether other rows than before are expected, as after `Load`.

        Raises:
            ConsistencyError: rows were replaced, or an update is gone that had been acknowledged.
        """
        member = self._member
        async with self._joining:

            async def call(left_s: float) -> Any:
                request = pb.JoinRequest(
                    client=member.client,
                    num_clients=member.num_clients,
                    session=member.session,
                    seen_epoch=self.epoch,
                )
                return await self.stub.Join(request, timeout=left_s)

            reply = await self._again(self._watched(call, of_any_epoch=True), self._turned)
            if is_anew and reply.rows_since > self.epoch:
                self.acknowledged.clear()
            elif self.epoch:
                self._check_same(reply)
            self.epoch, self.steps = reply.epoch, dict(reply.steps)
            self.is_asynchronous = reply.is_asynchronous

    async def joined(self) -> None:
        """Join unless that is done."""
        if not self.epoch:
            await self.join()

    async def repeated(
        self,
        call: Callable[[float], Awaitable[_T]],
        *,
        before_again: Callable[[], Awaitable[None]] | None = None,
        of_any_epoch: bool = False,
    ) -> _T:
        """Return what a call comes to, made again while the owner cannot be reached, until the deadline.

        Args:
            call: given the seconds that are left; it asks `stub`.
            before_again: done before each repetition.
            of_any_epoch: whether it goes on where an epoch begins, as `Load` does, which begins one.
        """

        async def prepare() -> None:
            await self._turned()
            if before_again is not None:
                await before_again()
            elif not of_any_epoch and 0 < self.epoch < self._primary_epoch:
                # Whoever only reads is waited for, too: a primary that is alone acknowledges when all have joined.
                await self.join()

        return await self._again(self._watched(call, of_any_epoch=of_any_epoch), prepare)

    async def find_primary(self) -> None:
        """Turn to the primary of a pair, the other one if it must be; stay where there is none yet.

        Raises:
            ConfigError: the servers are no pair.
        """
        async with self._finding:
            seen = await asyncio.gather(*map(self._look, self._copies))
            found = [(reply, index) for index, reply in enumerate(seen) if reply is not None]
            for reply, index in found:
                if reply.role == pb.ROLE_UNSPECIFIED:
                    raise ConfigError(
                        f"servers of a pair must be told of each other; {self._copies[index].address} has no peer; "
                        "start it with --peer"
                    )
            primaries = [
                (reply.epoch, index) for reply, index in found if reply.role == pb.PRIMARY and reply.epoch >= self.epoch
            ]
            if primaries:
                self._primary_epoch, self._at = max(primaries)
                self._lost_at_s = None
                return
            now = time.monotonic()
            self._lost_at_s = self._lost_at_s or now
            replicas = [(reply.epoch, -index) for reply, index in found if reply.role == pb.REPLICA]
            is_lost = len(replicas) == len(self._copies) or now - self._lost_at_s >= self._failover_s
            if replicas and is_lost:
                self._at = -max(replicas)[1]
                request = pb.PromoteRequest(seen_epoch=self.epoch)
                try:
                    promoted = await self.stub.Promote(request, timeout=self._deadline_s)
                except grpc.RpcError as error:
                    raise error_of(error, self.address) from None
                self._primary_epoch = promoted.epoch
                self._lost_at_s = None

    async def close(self) -> None:
        """Let the channels go."""
        if self._watching is not None:
            self._watching.cancel()
        for copy in (*self._copies, *self._left):
            await copy.channel.close()

    def _reached(self, address: str) -> _Copy:
        channel = client_channel(address, self._channel, _OPTIONS)
        return _Copy(address, channel, Rpcs(channel))

    async def _watch(self) -> None:
        """Join again when an epoch begins, also while nothing is asked for: others wait until all have joined."""
        while True:
            await asyncio.sleep(self._failover_s)
            with contextlib.suppress(MfdistError):  # whoever asks next meets it, too
                seen = await self._look(self._copies[self._at])
                if seen is not None and seen.role == pb.PRIMARY and 0 < self.epoch < seen.epoch:
                    await self.join()

    async def _turned(self) -> None:
        if len(self._copies) > 1:
            await self.find_primary()

    async def _find_one(self) -> None:
        await self.find_primary()
        if self._lost_at_s is not None:
            raise UnavailableError(f"a pair must have a primary; got none of {', '.join(self.addresses)}; start one")

    def _check_same(self, reply: pb.JoinReply) -> None:
        if reply.rows_since > self.epoch:
            raise ConsistencyError(
                f"rows must be those that this client trains; server {self.address} has others since epoch "
                f"{epochs.text(self.epoch)}: another client has loaded a checkpoint into these servers; stop that "
                "client, then load your own checkpoint (mfdist train --resume)"
            )
        for table, step in self.acknowledged.items():
            if (has := reply.held_steps.get(table, 0)) < step:
                raise ConsistencyError(
                    f"a server must have what was acknowledged; server {self.address} has {has} of {step} steps of "
                    f'table "{table}"; load a checkpoint on all servers and go on from there'
                )

    def _watched(
        self, call: Callable[[float], Awaitable[_T]], *, of_any_epoch: bool
    ) -> Callable[[float], Awaitable[_T]]:
        """Return a call that is given up when the server that it asks does not answer or has begun another epoch."""
        if len(self._copies) == 1:
            return call

        async def watched(left_s: float) -> _T:
            asked = self._at
            task = asyncio.ensure_future(call(left_s))
            try:
                while not (await asyncio.wait({task}, timeout=self._failover_s))[0]:
                    seen = await asyncio.gather(*map(self._look, self._copies))
                    mine = seen[asked]
                    if mine is None and not any(seen):
                        continue  # a busy machine, perhaps, and nobody else to turn to
                    if mine is None:
                        raise UnavailableError(
                            f"server {self._copies[asked].address} must answer within {self._failover_s:g} s; it does "
                            "not; see whether it runs"
                        )
                    if mine.role != pb.PRIMARY or any(
                        reply is not None and reply.role == pb.PRIMARY and reply.epoch > mine.epoch for reply in seen
                    ):
                        raise NotPrimaryError(
                            f"the primary of a pair must be asked; server {self._copies[asked].address} is not any more"
                        )
                    if not of_any_epoch and 0 < self.epoch < mine.epoch:
                        raise UnavailableError(
                            f"a client must join again when an epoch begins; server {self._copies[asked].address} has "
                            f"begun {epochs.text(mine.epoch)}"
                        )
                return task.result()
            finally:
                task.cancel()

        return watched

    async def _again(
        self, call: Callable[[float], Awaitable[_T]], before_again: Callable[[], Awaitable[None]] | None = None
    ) -> _T:
        """Make a call until it succeeds, fails for good, or the deadline is over."""
        until = time.monotonic() + self._deadline_s
        pause_s, is_again = _FIRST_PAUSE_S, False
        said: tuple[str, MfdistError] | None = None
        while True:
            try:
                if is_again and before_again is not None:
                    await before_again()
                return await call(max(0.001, until - time.monotonic()))
            except grpc.RpcError as raised:
                error: MfdistError = error_of(raised, self.address)
                if is_said(raised):
                    said = self.address, error
                elif said is not None and (said[0], raised.code()) == (self.address, grpc.StatusCode.DEADLINE_EXCEEDED):
                    error = type(said[1])(f"{said[1]}; asked again, it did not answer before the deadline")
                else:
                    said = None
            except UnavailableError as raised:
                error, said = raised, None
            if not isinstance(error, UnavailableError) or time.monotonic() + pause_s >= until:
                raise error
            is_again = True
            await asyncio.sleep(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    async def _look(self, copy: _Copy) -> pb.DescribeReply | None:
        try:
            reply: pb.DescribeReply = await copy.stub.Describe(pb.DescribeRequest(), timeout=self._failover_s)
            return reply
        except grpc.RpcError as raised:
            error = error_of(raised, copy.address)
            if not isinstance(error, UnavailableError):
                raise error from None
            return None

"""The servers as a client reaches them, all of them together.

All traffic runs on one event loop in a thread of its own; callers wait for it from theirs.
"""

import asyncio
import concurrent.futures
import itertools
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from mfdist.errors import ConfigError, ConsistencyError, UnavailableError
from mfdist.table_server.channel import ChannelConfig
from mfdist.table_server.owner import Membership, Owner
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.status import error_of

_T = TypeVar("_T")
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0
#: How long servers may not be there before that is told, and how long each is then asked why.
_SILENCE_S, _LOOK_S = 3.0, 1.0

_logger = logging.getLogger(__name__)


class TableServers:
    """The servers that hold a model's tables, as one client among `num_clients` that train them.

    Args:
        addresses: HOST:PORT of each; a plan's owner i is the i-th, or with two replicas the i-th pair.
        client: this one's number.
        num_clients: how many train together, the same for all; each step of a table needs all of them.
        replicas: 2 where servers come in pairs, of which the second goes on when the first is gone; see
            `mfdist serve --peer`.
        deadline_s: longest wait for an answer, a server's restart included.
        failover_s: how long the primary of a pair may not answer before the other one is asked to take over.
        channel: TLS and token; by default neither, which servers on loopback allow.

    Raises:
        ConfigError: no address, two alike, or one that is not on loopback without TLS.
        UnavailableError: a server does not answer in time.
        ConsistencyError: two addresses are one server.

    Close it, or use it in a `with`; what is pushed is on disk then. Servers that are not there after three seconds are
    logged, once, as a warning.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        client: int = 0,
        num_clients: int = 1,
        replicas: int = 1,
        deadline_s: float = 60.0,
        failover_s: float = 3.0,
        channel: ChannelConfig | None = None,
    ) -> None:
        if not addresses or len(set(addresses)) != len(addresses):
            raise ConfigError(f"each table server has an address of its own; got {list(addresses)}")
        if not 0 <= client < num_clients:
            raise ConfigError(f"a client's number must lie in [0, {num_clients}); got {client}")
        if replicas not in (1, 2) or len(addresses) % replicas:
            raise ConfigError(
                "rows are held by one server, or by pairs of them that are listed one after the other; got "
                f"replicas={replicas} and {len(addresses)} addresses"
            )
        self.addresses = tuple(addresses)
        self.client, self.num_clients, self.replicas = client, num_clients, replicas
        self.deadline_s, self.failover_s = deadline_s, failover_s
        self.channel = channel
        self.session = secrets.randbits(63) or 1
        #: Set by whoever makes tables and then loads a checkpoint: they take part only from `RemoteTable.resume` on,
        #: when servers have forgotten the pushes that wait there for clients of before, perhaps more of them or fewer.
        self.joins_later = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mfdist-table-client", daemon=True)
        self._thread.start()
        self._is_closed = False
        self._pushing: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        try:
            known: dict[str, str] = {}
            for address, server_id in itertools.chain(*self.wait(self._connect())):
                if (other := known.setdefault(server_id, address)) != address:
                    raise ConsistencyError(
                        f"each address must be a server of its own; {other} and {address} are the same; name it once"
                    )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TableServers":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.addresses) // self.replicas

    def close(self) -> None:
        """Wait for pushes to be on disk, and let the channels go; what did not arrive is not raised here."""
        if self._is_closed:
            return
        self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result(self.deadline_s + 10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def move(self, addresses: Sequence[str]) -> None:
        """Begin to reach servers of pairs that were started again elsewhere at their new addresses; does not wait.

        Args:
            addresses: of all servers, in the order of the first ones.
        """
        self.addresses = tuple(addresses)
        self.submit(self.all(lambda owner: owner.move(self._of(owner.index))))

    def describe(self) -> list[pb.DescribeReply]:
        """Return what each server says it is and holds; of pairs, the one that is asked now."""
        return self.wait(self.all(lambda owner: owner.once("Describe", pb.DescribeRequest())))

    def flush(self) -> None:
        """Wait until everything pushed is on disk.

        Raises:
            MfdistError: a push was not taken; the first one's error.
        """
        self.wait(self._flush())

    def save(self, directory: str, step: int) -> None:
        """Let all servers save their shards as one checkpoint of whole tables, under the number `step`.

        Args:
            directory: as the servers see it; they share it.
            step: of the checkpoint.
        """
        self.flush()
        self.wait(self._save(directory, step))

    def load(self, directory: str, step: int | None = None) -> int:
        """Let all servers take their shards from a checkpoint, by default its last; return its step.

        All clients must look up and push nothing meanwhile; their tables then follow with `RemoteTable.resume`.
        """
        self.flush()
        request = pb.LoadRequest(directory=directory, step=step)
        replies = self.wait(self.all(lambda owner: owner.once("Load", request, of_any_epoch=True)))
        self.wait(self.all(lambda owner: owner.join(is_anew=True)))
        return int(replies[0].step)

    def drop(self, table: str) -> None:
        """Let all servers forget a table and its rows."""
        self.wait(self.all(lambda owner: owner.once("Drop", pb.DropRequest(table=table))))
        for owner in self._owners:
            owner.acknowledged.pop(table, None)

    # For RemoteTable.

    def owner(self, index: int) -> Owner:
        """Return a plan's owner."""
        return self._owners[index]

    def wait(self, doing: Coroutine[Any, Any, _T]) -> _T:
        """Return what comes of a coroutine on the event loop. Not to be called from there."""
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result()

    def submit(self, doing: Coroutine[Any, Any, _T]) -> "concurrent.futures.Future[_T]":
        """Begin a coroutine on the event loop."""
        return asyncio.run_coroutine_threadsafe(doing, self._loop)

    async def all(self, call: Callable[[Owner], Awaitable[_T]]) -> list[_T]:
        """Return what a call on every owner comes to, all at once."""
        return await gathered([call(owner) for owner in self._owners])

    def keep(self, pushing: "asyncio.Task[None]") -> None:
        """Keep a push until it is acknowledged; its failure is raised by whoever next asks. On the event loop."""
        self._pushing.add(pushing)

        def finished(task: "asyncio.Task[None]") -> None:
            self._pushing.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None and self._failed is None:
                self._failed = error

        pushing.add_done_callback(finished)

    def raise_failed(self) -> None:
        """Raise what became of an earlier push that failed after its gradients had come."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def _of(self, index: int) -> tuple[str, ...]:
        return self.addresses[index * self.replicas : (index + 1) * self.replicas]

    async def _connect(self) -> list[list[tuple[str, str]]]:
        """Reach all owners; return of each the addresses and ids of its servers."""
        member = Membership(self.client, self.num_clients, self.session)
        self._owners = [
            Owner(
                index,
                self._of(index),
                member,
                deadline_s=self.deadline_s,
                failover_s=self.failover_s,
                channel=self.channel,
            )
            for index in range(len(self))
        ]
        telling = asyncio.ensure_future(self._tell_of_silence())
        try:
            await self.all(lambda owner: owner.connect())
            return await self.all(lambda owner: owner.identities())
        finally:
            telling.cancel()

    async def _tell_of_silence(self) -> None:
        """Log which servers are waited for, and why, once they have had the time to answer."""
        await asyncio.sleep(_SILENCE_S)
        reasons = await self.all(_silence)
        silent = [f"{owner.address} ({why})" for owner, why in zip(self._owners, reasons, strict=True) if why]
        if silent:
            _logger.warning(
                "waiting for server %s, up to %g s (servers.deadline_s)", ", ".join(silent), self.deadline_s
            )

    async def _flush(self) -> None:
        if self._pushing:
            await asyncio.wait(list(self._pushing))
        self.raise_failed()

    async def _save(self, directory: str, step: int) -> None:
        """Ask all servers at once; where one dies, ask all anew, for the others wait for what it would have said."""
        until = time.monotonic() + self.deadline_s
        pause_s = _FIRST_PAUSE_S
        while True:
            meeting = "save" + secrets.token_hex(8)
            calls = {
                asyncio.ensure_future(self._save_part(owner, directory, step, meeting, until)): owner
                for owner in self._owners
            }
            done, late = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            for call in late:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            failed = [(calls[call], error) for call in done if (error := call.exception()) is not None]
            if not failed:
                return
            owner, raised = failed[0]
            error = error_of(raised, owner.address) if isinstance(raised, grpc.RpcError) else raised
            if not isinstance(error, UnavailableError) or time.monotonic() + pause_s >= until:
                raise error from None
            await asyncio.sleep(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    async def _save_part(self, owner: Owner, directory: str, step: int, meeting: str, until: float) -> Any:
        await owner.connect()  # of a pair to its primary, which may be another one than before
        request = pb.SaveRequest(
            directory=directory, step=step, rank=owner.index, world_size=len(self), meeting=meeting
        )
        left_s = max(0.001, until - time.monotonic())
        return await owner.stub.Save(request, timeout=left_s, wait_for_ready=self.replicas == 1)

    async def _disconnect(self) -> None:
        if self._pushing:
            await asyncio.wait(list(self._pushing), timeout=self.deadline_s)
        for owner in getattr(self, "_owners", []):
            await owner.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()


async def _silence(owner: Owner) -> str:
    """Return why an owner's server does not answer; empty where it does."""
    try:
        await owner.stub.Describe(pb.DescribeRequest(), timeout=_LOOK_S)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "no answer"
        # gRPC tells of all it has tried, and last of the cause with its number in brackets.
        said = str(error.details() or error.code().name).rpartition(": ")[2].partition(" (")[0]
        return said[:1].lower() + said[1:]
    return ""


async def sending(messages: Sequence[Any]) -> AsyncIterator[Any]:
    """Yield messages to a stream."""
    for message in messages:
        yield message


async def gathered(calls: Sequence[Awaitable[_T]]) -> list[_T]:
    """Return all results; where some fail, the first one's error, once all have ended."""
    if len(calls) == 1:
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]

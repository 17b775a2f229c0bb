"""Which of a pair a server is, at which epoch, who has joined at it: what it takes to acknowledge a push.

The rules are in the protocol. A primary begins alone, at each start and whenever it loses its replica: it raises its
epoch, and acknowledges what is on its own disk once all clients have joined at that epoch. When its replica has caught
up it is in sync, and acknowledges what its replica acknowledged.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol, TypeVar

from mfdist.errors import CheckpointError, ConfigError, ConsistencyError, MfdistError, NotPrimaryError, UnavailableError
from mfdist.table_server import epoch as epochs
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.store import LifeLog, Store

_T = TypeVar("_T")

Role = Literal["single", "primary", "replica"]

_logger = logging.getLogger(__name__)


class Replica(Protocol):
    """The replica, as long as it is there; what it is told arrives in its order."""

    def forward(self, life: str, version: int, client: int, payload: list[bytes]) -> None:
        """Send a push that is on this server's disk, unless it will be read from there."""

    def wrote(self, life: str, request: pb.WriteRequest, at: int, edit: str) -> Awaitable[None]:
        """Send what was written; return what is done once the replica has it or is lost."""

    async def sync(self) -> None:
        """Let it have the shards that are new or replaced, or lose it. Holding the node's `admin`."""

    def fail(self, why: MfdistError) -> None:
        """Say that it is lost."""


class Standing:
    """A server's role, epoch and clients. Made before the event loop runs; everything else is called on it.

    Args:
        store: where it is remembered.
        peer: address of the other server of the pair, empty as long as it is not known; None: there is none.

    Raises:
        ConfigError: pushes are not logged, which a pair needs.
    """

    def __init__(self, store: Store, peer: str | None) -> None:
        is_paired = peer is not None
        if is_paired and not store.is_logged:
            raise ConfigError(
                'servers of a pair must log pushes; got durability="checkpoint" with the peer '
                f'{peer}; set server.durability="log"'
            )
        self._store = store
        self.peer = peer or ""
        self.num_clients = store.number("num_clients")
        self.sessions: dict[int, int] = {}  # client → session
        self.rows_since = store.number("rows_since", epochs.FIRST)
        self.role: Role = _first_role(store) if is_paired else "single"
        self.epoch = store.number("epoch", 0 if self.role == "replica" else epochs.FIRST)
        if self.role == "primary" or not store.is_logged:
            # Of a primary, because its replica may be about to take over; else because pushes may have been lost.
            self.epoch = epochs.after(self.epoch)
            store.remember(epoch=self.epoch)
        if is_paired and store.role != self.role:
            store.remember(role=self.role)
        #: Of a primary: its replica has everything, and nothing is acknowledged without it.
        self.is_in_sync = False
        #: Of a primary in sync: its replica has said that it knows, and may take over.
        self.is_settled = False
        #: Of a replica: it has all rows of some moment, and is not being copied to.
        self.is_whole = True
        self.link: Replica | None = None
        #: life → the last version that the replica has acknowledged.
        self.acknowledged: dict[str, int] = {}
        self._pending: dict[tuple[str, int, int], list[concurrent.futures.Future[None]]] = {}
        self._over = asyncio.Event()
        self._changing = asyncio.Lock()

    @property
    def state(self) -> str:
        """Return the role as people see it: a primary without its replica is alone, a replica without rows copying."""
        if self.role == "primary" and not self.is_in_sync:
            return "alone"
        return "copying" if self.role == "replica" and not self.is_whole else self.role

    # Who may do what.

    def check_primary(self) -> None:
        """Raise NotPrimaryError where the other server of the pair is the one to ask."""
        if self.role == "replica":
            raise self._not_primary()

    def check_seen(self, epoch: int) -> None:
        """Raise NotPrimaryError where a client has seen a later epoch, which only the peer can have."""
        if epoch > self.epoch:
            raise NotPrimaryError(
                f"a server must be as new as what its clients have seen; this one has epoch {epochs.text(self.epoch)}, "
                f"the client has seen {epochs.text(epoch)}; ask {self.peer or 'the server of that epoch'}"
            )

    def check_client(self, client: int, session: int, epoch: int) -> None:
        """Raise unless a client may push.

        Raises:
            ConsistencyError: rows were replaced since it joined, or another one has taken its number.
            UnavailableError: it must join, or join again.
        """
        self.check_primary()
        if not self.rows_since <= epoch <= self.epoch:
            raise ConsistencyError(
                f"a push must be of the server's epoch {epochs.text(self.epoch)}; got {epochs.text(epoch)}; another "
                "client has loaded a checkpoint into this server since; stop that client, then load your own "
                "checkpoint (mfdist train --resume), or join again if it was this one"
            )
        if epoch != self.epoch:
            raise self._changed()
        if client not in self.sessions:
            # Unavailable, because clients then join and push again: a server that was started again knows none.
            raise UnavailableError(
                f"a client must join before it pushes; client {client} has not since this server's start; join, then "
                "send it again"
            )
        if self.sessions[client] != session:
            raise ConsistencyError(
                f"one process at a time may be client {client}; another one has joined after this one; stop one of "
                "the two, then go on from a checkpoint (mfdist train --resume)"
            )

    def joined(self, client: int, session: int) -> None:
        """Let a client take part, in the place of an earlier one of its number."""
        self.sessions[client] = session
        self._release()

    async def within(self, epoch: int, doing: Awaitable[_T]) -> _T:
        """Wait for what only makes sense as long as the epoch lasts.

        Raises:
            UnavailableError: it is over; the client must join again, or ask the peer.
        """
        if self.role == "single":
            return await doing
        task, over = asyncio.ensure_future(doing), asyncio.ensure_future(self._over.wait())
        try:
            if epoch == self.epoch and self.role == "primary":
                await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._changed() if self.role == "primary" else self._not_primary()
        finally:
            task.cancel()
            over.cancel()

    # What may be acknowledged.

    def log(self, life: str) -> "PairedLog":
        """Return where pushes of a life go: this disk, and the replica's."""
        return PairedLog(self, life, self._store.log(life))

    def refuse(self, error: BaseException, done: "concurrent.futures.Future[None]") -> None:
        """Refuse a push that this disk does not take; where the replica can go on, its client is sent there."""
        is_over = self.role == "replica" or (isinstance(error, CheckpointError) and self.resign(error))
        done.set_exception(self._not_primary() if is_over else error)

    def secure(
        self, life: str, version: int, client: int, payload: list[bytes], done: "concurrent.futures.Future[None]"
    ) -> None:
        """Let a push that is on this disk be acknowledged as soon as it may."""
        if self.role != "primary":
            done.set_exception(self._not_primary())
            return
        if self.link is not None:
            self.link.forward(life, version, client, payload)
        if self._may_go_alone:
            done.set_result(None)
        else:
            self._pending.setdefault((life, version, client), []).append(done)

    def replicated(self, life: str, version: int, client: int | None = None) -> None:
        """Note that the replica has a push, or, without a client, all up to a version."""
        self.acknowledged[life] = max(version, self.acknowledged.get(life, 0))
        if client is not None:
            keys = [(life, version, client)]
        else:
            keys = [key for key in self._pending if key[0] == life and key[1] <= version]
        self._resolve(keys)

    def lag(self, life: str, version: int) -> int:
        """Return how many updates the replica may lack; 0 of a server that has none."""
        return max(0, version - self.acknowledged.get(life, 0)) if self.role == "primary" else 0

    # Changes of role and epoch.

    async def loaded(self) -> None:
        """Begin an epoch with other rows; all clients must join again."""
        async with self._changing:
            epoch = epochs.after(self.epoch)
            await self._remember(epoch=epoch, rows_since=epoch)
            self.epoch = self.rows_since = epoch
            self.is_settled = False
            self.sessions.clear()

    async def lost_replica(self) -> None:
        """Go on alone, as soon as all clients know.

        Raises:
            CheckpointError: the epoch could not be remembered, so that it has not begun; try again.
        """
        async with self._changing:
            if self.role == "primary" and self.is_in_sync:
                epoch = epochs.after(self.epoch)
                await self._remember(epoch=epoch)
                if self.role != "primary":  # it has resigned meanwhile
                    return
                self.is_in_sync = False
                self._begin(epoch)
                fields = {"replica": self.peer, "epoch": epochs.text(epoch)}
                _logger.warning("going on alone: the replica was lost", extra={"fields": fields})

    async def take_over(self, seen: int, before: Callable[[], Awaitable[None]]) -> None:
        """Become the primary, once `before` is done."""
        async with self._changing:
            await before()
            epoch = epochs.taken_over(max(seen, self.epoch), self._store.server_id)
            await self._remember(epoch=epoch, role="primary")
            self.role, self.is_in_sync, self.acknowledged = "primary", False, {}
            self._begin(epoch)
            _logger.warning("took over as the primary", extra={"fields": {"epoch": epochs.text(epoch)}})

    async def step_down(self, theirs: int) -> None:
        """Become the replica, because the peer took over at a later epoch; pushes that wait are refused."""
        async with self._changing:
            if self.role != "primary" or theirs <= self.epoch:
                return
            await self._remember(role="replica")
            self.role, self.is_in_sync, self.link = "replica", False, None
            _logger.warning(
                "stepped down: %s has taken over",
                self.peer,
                extra={"fields": {"epoch": epochs.text(self.epoch), "theirs": epochs.text(theirs)}},
            )
            self._begin(self.epoch)
            self._refuse()

    def resign(self, why: Exception) -> bool:
        """Become the replica because this disk fails, if the replica can go on from where this is; return whether so.

        Nothing is written, which the disk would not allow: at its next start this is an old primary that wakes up. Of
        epoch 0 it is asked by nobody to take over; it follows again, by a copy, when its disk works.
        """
        if self.role != "primary" or not self.is_settled:
            return False
        _logger.warning("stepping down for %s, which has everything: %s", self.peer, why)
        link, self.role, self.is_in_sync, self.link = self.link, "replica", False, None
        self._begin(0)
        self._refuse()
        if link is not None:
            link.fail(UnavailableError("this server has stepped down"))
        return True

    async def followed(self, epoch: int, rows_since: int) -> None:
        """Remember, as the replica, that this has everything its primary has at an epoch."""
        async with self._changing:
            if self.role == "replica":
                await self._remember(epoch=epoch, rows_since=rows_since, role="replica")
                self.epoch, self.rows_since, self.is_whole = epoch, rows_since, True

    async def set_num_clients(self, number: int) -> None:
        """Remember how many clients push; they must join again."""
        await self._remember(num_clients=number)
        self.num_clients = number
        self.sessions.clear()

    @property
    def _may_go_alone(self) -> bool:
        is_complete = 0 < self.num_clients == len(self.sessions)
        return self.role == "primary" and not self.is_in_sync and is_complete

    def _begin(self, epoch: int) -> None:
        self.epoch, self.is_settled = epoch, False
        self.sessions.clear()
        over, self._over = self._over, asyncio.Event()
        over.set()

    def _refuse(self) -> None:
        for waiting in self._pending.values():
            for done in waiting:
                done.set_exception(self._not_primary())
        self._pending.clear()

    def _release(self) -> None:
        if self._may_go_alone:
            self._resolve(list(self._pending))

    def _resolve(self, keys: list[tuple[str, int, int]]) -> None:
        for key in keys:
            for done in self._pending.pop(key, ()):
                done.set_result(None)

    async def _remember(self, **values: int | str) -> None:
        await asyncio.to_thread(self._store.remember, **values)

    def _not_primary(self) -> NotPrimaryError:
        return NotPrimaryError(
            f"rows must be changed at the primary; this server is the replica, at epoch {epochs.text(self.epoch)}; "
            f"ask {self.peer or 'the other one'}, or promote this one where that is gone"
        )

    def _changed(self) -> UnavailableError:
        return UnavailableError(
            f"a push must be of the server's epoch, {epochs.text(self.epoch)} since its replica was lost or it took "
            "over; join again and send it again"
        )


def _first_role(store: Store) -> Role:
    """Return what a server of a pair was last; one that had no peer yet is the primary if it holds anything."""
    is_primary = store.role == "primary" or (not store.role and store.has_shards)
    return "primary" if is_primary else "replica"


class PairedLog:
    """The pushes of one life of a shard, which are kept once both servers have them."""

    def __init__(self, standing: Standing, life: str, log: LifeLog) -> None:
        self._standing, self._life, self._log = standing, life, log

    def append(self, version: int, client: int, payload: list[bytes]) -> "concurrent.futures.Future[None]":
        """Return what is done once the push may be acknowledged; of a replica, once it is on its disk."""
        here = self._log.append(version, client, payload)
        if self._standing.role != "primary":
            return here
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_running_or_notify_cancel()
        loop = asyncio.get_running_loop()

        def on_disk() -> None:
            if (error := here.exception()) is not None:
                self._standing.refuse(error, done)
            else:
                self._standing.secure(self._life, version, client, payload, done)

        def written(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited with it
                loop.call_soon_threadsafe(on_disk)

        here.add_done_callback(written)
        return done

"""Which pushes make a table's next update, and that none is lost or applied twice.

Synchronous: update v is the pushes of all clients for their step v, applied as one in the order of the clients.
Asynchronous: each push is an update of its own, in the order in which they came; a client waits where it would be more
than `max_staleness` steps ahead of the slowest.

A push is known by (client, step). One that has been applied is answered again from what was kept of the client's last.
It goes to the log as it is taken in and is applied at once; no lookup is answered from rows whose update is not yet on
disk, so it makes no difference to anyone when the server dies in between.
"""

import asyncio
import concurrent.futures
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mfdist.errors import ConsistencyError, InternalError, UnavailableError
from mfdist.table_server.gate import Gate
from mfdist.table_server.shard import Contribution, Shard

_T = TypeVar("_T")

_MAX_NAMED = 16  # of the clients that are late


class Log(Protocol):
    """Where a table's pushes are kept until a checkpoint holds them."""

    def append(self, version: int, client: int, payload: list[bytes]) -> "concurrent.futures.Future[None]":
        """Return what is done once the push is on disk; one that is there already is not appended again."""


@dataclass(frozen=True, eq=False)
class Push:
    """What a client contributes to a table in one step; no contribution where it has no lookups."""

    client: int
    step: int
    lr: float
    contribution: Contribution | None
    payload: list[bytes] = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """What a push led to."""

    score_gradients: Tensor | None  # None of pushes without lookups, and of known ones before the client's last
    on_disk: Awaitable[None]
    was_known: bool


@dataclass(frozen=True)
class Kept:
    """A client's last applied push, to be answered again."""

    step: int
    version: int  # of the table after it
    score_gradients: Tensor | None


class Updates:
    """The updates of one shard. All methods but `replay` run on the server's event loop.

    Args:
        shard: what is updated.
        log: of its pushes.
        run: runs a function in a thread.
        max_staleness: steps a client may be ahead of the slowest; None: synchronous.
    """

    def __init__(
        self,
        shard: Shard,
        log: Log,
        run: Callable[..., Awaitable[list[Tensor]]],
        max_staleness: int | None,
    ) -> None:
        self.shard = shard
        self.gate = Gate()
        #: Held while rows change; whoever holds it sees one version.
        self.changing = asyncio.Lock()
        self.log = log
        #: Updates whose answers are noted: the shard's own count is ahead of it while a thread makes an update.
        self._num_noted = shard.version
        #: Done when the kernels of lookups are there.
        self.kernels: concurrent.futures.Future[None] | None = None
        #: client → steps done.
        self.steps: dict[int, int] = {}
        #: client → its last answer.
        self.kept: dict[int, Kept] = {}
        self._run = run
        self._max_staleness = max_staleness
        self._waiting: dict[int, dict[int, Push]] = {}  # step → client → push
        self._applying: set[int] = set()
        self._answers: dict[tuple[int, int], asyncio.Future[Tensor | None]] = {}
        self._unwritten: dict[tuple[int, int], asyncio.Future[None]] = {}  # (version, client)
        self._progress = asyncio.Condition()

    @property
    def is_waiting(self) -> bool:
        """Return whether pushes wait for those of other clients."""
        return bool(self._waiting)

    async def push(self, push: Push, num_clients: int, wait_s: float) -> Answer:
        """Take a push in and wait until it is applied.

        Raises:
            UnavailableError: another client's push of the step did not come in time; ask again.
            ConsistencyError: it contradicts what came before.
        """
        if push.step <= self.done(push.client):
            return self._known(push)
        if self._max_staleness is None:
            return await self._together(push, num_clients, wait_s)
        return await self._alone(push, num_clients, wait_s)

    async def reached(self, version: int, wait_s: float, num_clients: int = 0) -> None:
        """Wait until the table has had `version` updates, and may be looked up.

        Raises:
            UnavailableError: it has not in time; the message says who is late.
        """
        await self._kernels_there(wait_s)
        await self._until(lambda: self._num_noted >= version, wait_s, num_clients)

    async def on_disk(self, version: int) -> None:
        """Wait until all updates up to `version` are on disk.

        Raises:
            CheckpointError: the log cannot be written.
        """
        while waiting := [future for (update, _), future in self._unwritten.items() if update <= version]:
            await asyncio.gather(*(asyncio.shield(future) for future in waiting))

    def forget(self) -> None:
        """Begin anew after the rows were replaced; pushes that wait are refused."""
        for future in self._answers.values():
            if not future.done():
                future.set_exception(_loaded_anew())
        self._waiting.clear()
        self._answers.clear()
        self._unwritten.clear()
        self.steps.clear()
        self.kept.clear()
        self._num_noted = self.shard.version

    async def follow(self, version: int, push: Push, num_clients: int) -> Awaitable[None]:
        """Take in, as a replica, what the primary has logged, and apply what is complete; return what is on disk then.

        Raises:
            InternalError: asynchronous pushes did not come in their order.
        """
        on_disk = self._written(version, push)
        if version <= self.shard.version:
            return on_disk
        if self._max_staleness is not None:
            if version != self.shard.version + 1:
                raise InternalError(f'update {version} of table "{self.shard.name}" came after {self.shard.version}')
            async with self.changing:
                await self._change([push])
            await self._tell()
            return on_disk
        self._waiting.setdefault(version, {})[push.client] = push
        while len(group := self._waiting.get(self.shard.version + 1, {})) == num_clients > 0:
            await self._apply(self.shard.version + 1, group)
        return on_disk

    def replay(self, pushes: Iterable[tuple[int, Push]], num_clients: int) -> int:
        """Apply what the log holds, as (version, push) in its order, before the server listens; return how many.

        What is left waits for pushes that had not come.
        """
        num_applied = 0
        for version, push in pushes:
            if version <= self.shard.version:
                continue
            if self._max_staleness is not None:
                self._apply_now([push])
                num_applied += 1
                continue
            group = self._waiting.setdefault(version, {})
            group[push.client] = push
            while len(group := self._waiting.get(self.shard.version + 1, {})) == num_clients > 0:
                del self._waiting[self.shard.version + 1]
                self._apply_now([group[client] for client in sorted(group)])
                num_applied += num_clients
        return num_applied

    # Synchronous steps.

    async def _together(self, push: Push, num_clients: int, wait_s: float) -> Answer:
        await self.reached(push.step - 1, wait_s, num_clients)
        if push.step <= self.done(push.client):
            return await self.push(push, num_clients, wait_s)
        group = self._waiting.setdefault(push.step, {})
        key = (push.step, push.client)
        if (before := group.get(push.client)) is None:
            self._check_rate(push, group)
            group[push.client] = push
        elif before.payload != push.payload:
            raise ConsistencyError(
                f"a push sent again must be the same; client {push.client}, step {push.step} of table "
                f'"{self.shard.name}" came before with other contents; load a checkpoint and go on from there'
            )
        if key not in self._answers:
            self._answers[key] = _heeded(asyncio.get_running_loop().create_future())
        answer, on_disk = self._answers[key], self._written(push.step, push)
        if len(group) == num_clients and push.step not in self._applying:
            await _whatever_happens(self._apply(push.step, group))
        done, _ = await asyncio.wait([answer], timeout=wait_s)
        if not done:
            raise self._late(push.step, num_clients, wait_s)
        return Answer(await answer, on_disk, before is not None)

    def _check_rate(self, push: Push, group: dict[int, Push]) -> None:
        for other in group.values():
            if other.lr != push.lr:
                raise ConsistencyError(
                    f'all clients must train a table at one rate; step {push.step} of table "{self.shard.name}" has '
                    f"lr={other.lr} from client {other.client} and {push.lr} from client {push.client}"
                )

    # Asynchronous ones.

    async def _alone(self, push: Push, num_clients: int, wait_s: float) -> Answer:
        assert self._max_staleness is not None
        ahead = self._max_staleness

        def may_go() -> bool:
            slowest = min(self.steps.get(client, 0) for client in range(num_clients))
            return self.done(push.client) == push.step - 1 and push.step <= slowest + 1 + ahead

        await self._until(may_go, wait_s, num_clients)
        return await _whatever_happens(self._apply_alone(push))

    async def _apply_alone(self, push: Push) -> Answer:
        async with self.changing:
            if push.step <= self.done(push.client):  # it came twice
                return self._known(push)
            if push.step != self.done(push.client) + 1:
                raise _loaded_anew()
            on_disk = self._written(self.shard.version + 1, push)
            await self._change([push])
        await self._tell()
        return Answer(self.kept[push.client].score_gradients, on_disk, False)

    # Both.

    async def _apply(self, step: int, group: dict[int, Push]) -> None:
        self._applying.add(step)
        try:
            async with self.changing:
                if self._waiting.get(step) is group and self.shard.version == step - 1:
                    await self._change([group[client] for client in sorted(group)])
                    del self._waiting[step]
        finally:
            self._applying.discard(step)
        await self._tell()

    async def _change(self, pushes: list[Push]) -> None:
        async with self.gate.writing():
            contributions = [push.contribution for push in pushes if push.contribution is not None]
            made = await self._run(self.shard.update, contributions, pushes[0].lr)
        self._note(pushes, made)

    def _apply_now(self, pushes: list[Push]) -> None:
        contributions = [push.contribution for push in pushes if push.contribution is not None]
        self._note(pushes, self.shard.update(contributions, pushes[0].lr))

    def _note(self, pushes: list[Push], made: list[Tensor]) -> None:
        gradients = iter(made)
        self._num_noted = self.shard.version
        for push in pushes:
            found = next(gradients) if push.contribution is not None else None
            self.steps[push.client] = push.step
            self.kept[push.client] = Kept(push.step, self.shard.version, found)
            if (future := self._answers.pop((push.step, push.client), None)) and not future.done():
                future.set_result(found)

    def _known(self, push: Push) -> Answer:
        """Answer a push that has been applied; were it not on disk, it would go there again."""
        kept = self.kept.get(push.client)
        if kept is None or kept.step != push.step:
            return Answer(None, _nothing_to_wait_for(), True)
        return Answer(kept.score_gradients, self._written(kept.version, push), True)

    def done(self, client: int) -> int:
        """Return how many steps of a client are applied."""
        return self._num_noted if self._max_staleness is None else self.steps.get(client, 0)

    def held(self, client: int) -> int:
        """Return how many steps of a client are here, applied or waiting for those of others."""
        step = self.done(client)
        while client in self._waiting.get(step + 1, {}):
            step += 1
        return step

    def _written(self, version: int, push: Push) -> "asyncio.Future[None]":
        """Return what is done once a push is on disk, which it is sent to unless it is on its way.

        Whoever waits for it may be cancelled, as a call is whose client is gone; what others wait for goes on.
        """
        key = (version, push.client)
        if (known := self._unwritten.get(key)) and not (known.done() and known.exception()):
            return _heeded(asyncio.shield(known))
        future = asyncio.wrap_future(self.log.append(version, push.client, push.payload))
        self._unwritten[key] = future

        def finished(done: "asyncio.Future[None]") -> None:
            if not done.cancelled() and done.exception() is None and self._unwritten.get(key) is done:
                del self._unwritten[key]

        future.add_done_callback(finished)
        return _heeded(asyncio.shield(future))

    async def _until(self, holds: Callable[[], bool], wait_s: float, num_clients: int) -> None:
        if holds():
            return
        async with self._progress:
            try:
                await asyncio.wait_for(self._progress.wait_for(holds), wait_s)
            except TimeoutError:
                raise self._late(self.shard.version + 1, num_clients, wait_s) from None

    async def _kernels_there(self, wait_s: float) -> None:
        if self.kernels is None or self.kernels.done():
            return
        done, _ = await asyncio.wait([asyncio.wrap_future(self.kernels)], timeout=wait_s)
        if not done:
            raise UnavailableError(
                f'the kernels of table "{self.shard.name}" must be there before it is looked up; they are being '
                f"compiled, once on this machine, which takes longer than the {wait_s:g} s of the caller; ask again in "
                "a minute"
            )

    async def _tell(self) -> None:
        async with self._progress:
            self._progress.notify_all()

    def _late(self, step: int, num_clients: int, wait_s: float) -> UnavailableError:
        if not num_clients:
            return UnavailableError(
                f'update {step} of table "{self.shard.name}" needs clients that push it within {wait_s:g} s; none has '
                "joined; ask for a version that there is, or start the clients of training"
            )
        come = self._waiting.get(step, {})
        missing = (str(client) for client in range(num_clients) if client not in come)
        late = ", ".join(itertools.islice(missing, _MAX_NAMED))
        if not late:
            return UnavailableError(
                f'update {step} of table "{self.shard.name}" must be made within {wait_s:g} s; all pushes have come, '
                "and it is not done: the server is busy, or its kernels are being compiled, once on a machine; send "
                "it again"
            )
        return UnavailableError(
            f'update {step} of table "{self.shard.name}" needs the pushes of all {num_clients} clients within '
            f"{wait_s:g} s; late: client {late}; see whether it still runs"
        )


async def _nothing_to_wait_for() -> None:
    return None


async def _whatever_happens(doing: Coroutine[Any, Any, _T]) -> _T:
    """Wait for what must not stop half way because the call that asked for it is gone."""
    return await asyncio.shield(asyncio.ensure_future(doing))


def _heeded(future: "asyncio.Future[_T]") -> "asyncio.Future[_T]":
    """Return a future whose failure is no news where nobody waits for it any more, as after a call was given up."""
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return future


def _loaded_anew() -> ConsistencyError:
    return ConsistencyError(
        "a push must be of the rows that its client looked up; they were replaced meanwhile: another client has loaded "
        "a checkpoint into these servers, or changed the table; stop that client, then load your own checkpoint "
        "(mfdist train --resume)"
    )

"""How the ranks that save one checkpoint agree: short messages through a key-value store, never a collective.

Call order: every rank calls `begin` for each save or load, and then `share` with the same sequence of tags. A rank that
cannot go on calls `fail` instead, and all others get its error from that very `share`, so nobody waits for a rank that
has given up. Each wait has a deadline and says who is late; who waited so long has given up too. May be called from any
one thread at a time, also beside training's own collectives.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from mfdist.errors import InternalError, MfdistError, UnavailableError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from mfdist.checkpoint.state import JSON

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.0005, 0.05


class Ranks(Protocol):
    """The ranks of a run, as seen by one of them."""

    rank: int
    world_size: int

    def begin(self) -> None:
        """Begin a save or a load, as all ranks do equally often; how earlier ones ended is of no account to it."""

    def share(self, tag: str, value: "JSON") -> list[Any]:
        """Return every rank's value, by rank.

        Raises:
            MfdistError: another rank failed; its own error, with its rank.
            UnavailableError: a rank did not come before the deadline.
        """

    def fail(self, error: BaseException) -> None:
        """Tell the others, who are or will be in `share`, that this rank gives up; waits for nobody."""

    def leave(self) -> None:
        """Let this rank's own `share` wait no longer, now or later. From any thread."""


class OneRank:
    """A process that saves by itself."""

    rank = 0
    world_size = 1

    def begin(self) -> None:
        """Begin, with nothing to forget."""

    def share(self, tag: str, value: "JSON") -> list[Any]:
        """Return the one value."""
        return [value]

    def fail(self, error: BaseException) -> None:
        """Tell nobody."""

    def leave(self) -> None:
        """Wait for nobody, as ever."""


class StoreRanks:
    """Ranks that talk through a `torch.distributed` store.

    Args:
        store: a TCPStore, FileStore or the like that all ranks reach, best behind a PrefixStore of its own: a run that
            starts again under the same store needs another prefix. It is polled, so that the store's one connection
            stays free for others.
        rank: this process's.
        world_size: how many there are.
        deadline_s: how long a rank waits for the slowest one, the time that one writes included.
    """

    def __init__(self, store: "Store", rank: int, world_size: int, *, deadline_s: float = 1800.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._deadline_s = deadline_s
        self._meeting = 0
        self._round = 0
        self._told: list[str] = []
        self._has_left = threading.Event()

    @classmethod
    def of_process_group(cls, *, deadline_s: float = 1800.0) -> "StoreRanks":
        """Return the ranks of the default process group, over the store it was set up with.

        Called on: every rank, after `init_process_group`, equally often.
        """
        from torch.distributed import distributed_c10d as dist

        store = dist._get_default_store()
        number = store.add(f"mfdist-checkpoint-{dist.get_rank()}", 1)  # earlier ones left messages behind
        own = dist.PrefixStore(f"mfdist-checkpoint-{number}", store)
        return cls(own, dist.get_rank(), dist.get_world_size(), deadline_s=deadline_s)

    def begin(self) -> None:
        """Begin a save or a load; see `Ranks`."""
        self._meeting += 1
        self._round = 0

    def share(self, tag: str, value: "JSON") -> list[Any]:
        """Return every rank's value, by rank; see `Ranks`."""
        keys = [f"{self._meeting}/{self._round}/{tag}/{rank}" for rank in range(self.world_size)]
        with self._reaching_the_store():
            read = len(self._told)
            self._tell(keys[self.rank], value)
            self._wait_for(tag, keys)
            values = [json.loads(self._store.get(key)) for key in keys]
            for _ in range(read):  # all have come to this round, so nobody will read what was told before it
                self._store.delete_key(self._told.pop(0))
        self._round += 1
        return values

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank gives up; see `Ranks`."""
        kind = error.kind if isinstance(error, MfdistError) else InternalError.kind
        message: list[JSON] = [self.rank, kind, f"{error}" if isinstance(error, MfdistError) else repr(error)]
        with contextlib.suppress(UnavailableError), self._reaching_the_store():  # what failed is more worth telling
            self._tell(self._failed, message)

    def leave(self) -> None:
        """Let this rank's own `share` wait no longer; see `Ranks`."""
        self._has_left.set()

    @contextlib.contextmanager
    def _reaching_the_store(self) -> Iterator[None]:
        try:
            yield
        except MfdistError:
            raise
        except (RuntimeError, OSError) as error:  # what torch raises when the process that serves the store has gone
            raise UnavailableError(
                f"ranks that save together must reach their store; rank {self.rank} of {self.world_size} does not "
                f"({str(error).splitlines()[0]}); see whether the process that serves it still runs."
            ) from error

    def _tell(self, key: str, value: "JSON") -> None:
        self._told.append(key)
        self._store.set(key, json.dumps(value))

    @property
    def _failed(self) -> str:
        """Where it is told that a rank has given up; of several the last."""
        return f"{self._meeting}/failed"

    def _wait_for(self, tag: str, keys: list[str]) -> None:
        deadline = time.monotonic() + self._deadline_s
        pause_s = _FIRST_PAUSE_S
        missing = dict(enumerate(keys))
        while True:
            if self._store.check([self._failed]):
                raise _remote_error(*json.loads(self._store.get(self._failed)))
            missing = {rank: key for rank, key in missing.items() if not self._store.check([key])}
            if not missing:
                return
            reason = ""
            if self._has_left.is_set():
                reason = f"; rank {self.rank} of {self.world_size} was told to wait no longer; save again"
            elif time.monotonic() > deadline:
                late = ", ".join(map(str, missing))
                reason = (
                    f" within {self._deadline_s:g} s; late: rank {late} of {self.world_size}; see whether it still "
                    "runs, or whether it saves at another step."
                )
            if reason:
                error = UnavailableError(f"every rank must come to the checkpoint's {tag!r}{reason}")
                self.fail(error)
                raise error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)


def together(ranks: Ranks, tag: str, act: Callable[[], "JSON"]) -> list[Any]:
    """Return what `act` returns on every rank; where it fails on one, raise on all.

    Raises:
        Whatever this rank's `act` raises, else what another rank's did.
    """
    try:
        value = act()
    except BaseException as error:
        ranks.fail(error)
        raise
    return ranks.share(tag, value)


def _remote_error(rank: int, kind: str, message: str) -> MfdistError:
    classes = [MfdistError]
    for error in classes:
        classes += error.__subclasses__()
    found = next((error for error in reversed(classes) if error.kind == kind), InternalError)
    return found(f"rank {rank}: {message}")

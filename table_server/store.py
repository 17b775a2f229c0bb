"""A server's data folder: what it must find again after it was killed.

    lock              held by the one process that uses the folder
    checkpoints/      zarr stores of its shards, as `mfdist.checkpoint` writes them
    ledger/           pushes since the last of them, and what the server was told: shards, clients, epoch

A shard is found again as the last checkpoint that has it, or its first rows drawn from its seed, and the pushes after
that. Pushes are logged under the name of the shard's life, its history in the protocol: a table that was dropped and
made again, or loaded, begins another one, so that what was logged before can never be applied to it. A replica that
takes over begins another one too, from the version that it has: what the old primary logged on its own is none of it.
"""

import concurrent.futures
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import JSON, CheckpointState
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import CheckpointError, MfdistError, UnavailableError
from mfdist.table_server.disk_room import reason_of
from mfdist.table_server.ledger import Ledger
from mfdist.table_server.messages import ShardSpec, shard_message, shard_of
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.shard import Shard
from mfdist.table_server.updates import Kept

_KEPT_CHECKPOINTS = 2
#: What is left to do where neither the log nor an older checkpoint has what was acknowledged.
_BEGIN_ANEW = (
    "give this server an empty folder: it then copies its rows from the other server of its pair, or gets them from a "
    "checkpoint of the run, by mfdist train --resume"
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A shard with what its updates need to know, as a checkpoint has it."""

    shard: Shard
    life: str
    steps: Mapping[int, int]
    kept: Mapping[int, Kept]
    edit: str = ""  # names what was last written to its rows
    is_saved: bool = False  # whether it is as a checkpoint has it


class Store:
    """The folder, held by this process until `close`.

    Args:
        folder: made if it is not there.
        is_logged: whether pushes are logged; otherwise they last from the next checkpoint on.

    Raises:
        UnavailableError: another server holds it.
        CheckpointError: it cannot be read or written, or is damaged.
    """

    def __init__(self, folder: Path, *, is_logged: bool = True) -> None:
        self.folder = folder
        self.is_logged = is_logged
        self._lock = _locked(folder)
        try:
            self.ledger = Ledger(folder / "ledger")
            for note in self.ledger.notes:
                _logger.warning("recovered: %s", note)
        except BaseException:
            os.close(self._lock)
            raise
        self.checkpoints = CheckpointDirectory(folder / "checkpoints")
        #: table → its version in the last checkpoint, and when that was or this began; for who looks on.
        self.saved_versions: dict[str, int] = {}
        self.saved_at_s = time.monotonic()
        self._num_saved_bytes = 0  # of all that was ever written to the log: those before the last checkpoint
        self._found: dict[str, int] = {}  # life → its version in the checkpoint that recovery began from
        self.server_id = self._once("server_id", secrets.token_hex(8).encode()).decode()

    # What the server was told.

    def number(self, key: str, default: int = 0) -> int:
        """Return a number that was remembered: epoch, rows_since, num_clients."""
        return int(self.ledger.get(key) or default)

    def remember(self, **values: int | str) -> None:
        """Remember values by name, on disk when this returns."""
        for done in [self.ledger.put(key, str(value).encode()) for key, value in values.items()]:
            done.result()

    @property
    def role(self) -> str:
        """Return which of a pair this was last, or nothing."""
        return (self.ledger.get("role") or b"").decode()

    @property
    def has_shards(self) -> bool:
        """Return whether there is any shard."""
        return bool(self.ledger.items("shard/"))

    def add(self, spec: ShardSpec, life: str | None = None) -> str:
        """Remember a shard, on disk when this returns; return the name of its life."""
        life = life or secrets.token_hex(8)
        record = pb.CreateRequest(shard=shard_message(spec)).SerializeToString(deterministic=True)
        self.ledger.put(f"shard/{spec.table.name}", life.encode() + record).result()
        return life

    def forget(self, table: str) -> None:
        """Forget a shard and its pushes."""
        self.ledger.delete(f"shard/{table}").result()

    def fork(self, lives: Sequence[str]) -> list[str]:
        """Begin other lives from what these have, on disk when this returns; return their names, in order."""
        names = [secrets.token_hex(8) for _ in lives]
        self.remember(**{f"fork/{old}": new for old, new in zip(lives, names, strict=True)})
        return names

    # Recovery.

    def find(self) -> Iterator[Held]:
        """Yield every shard, as the last checkpoint has it; call once, before anything else.

        Raises:
            CheckpointError: the last checkpoint is damaged, or gone with pushes that were dropped from the log for it.
        """
        saved = self._saved()
        for key, record in self.ledger.items("shard/"):
            born, message = record[:16].decode(), pb.CreateRequest.FromString(record[16:])
            spec = shard_of(message.shard)
            name = spec.table.name
            told = _told(saved, name)
            if saved is None or told is None or told["born"] != born:
                yield Held(Shard(spec), self._names(born)[-1], {}, {})
                continue
            assert key == f"shard/{name}"
            kept = {
                int(client): Kept(step, version, saved.dense.get(f"answers/{name}/{client}"))
                for client, (step, version) in told["kept"].items()
            }
            # How it is trained may have changed since it was made.
            spec = shard_of(pb.Shard.FromString(bytes.fromhex(told["spec"])))
            shard = Shard(spec, saved.tables[name], told["version"])
            self.saved_versions[name] = shard.version
            steps = {int(client): step for client, step in told["steps"].items()}
            names = self._names(told["life"])
            self._found |= dict.fromkeys(names, shard.version)
            yield Held(shard, names[-1], steps, kept, told.get("edit", ""), is_saved=True)

    def pushes(self, life: str, after: int = -1) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (version, messages) of each push of a life, in the order they were logged, those before a fork first.

        What was logged before a fork for versions after it may come again behind it, and is then what holds.

        Args:
            life: its name.
            after: only pushes of later versions.
        """
        before = {new: old for old, new in self._forks().items()}
        names = [life]
        while names[-1] in before:
            names.append(before[names[-1]])
        for name in reversed(names):
            for logged in self.ledger.pushes(name, after):
                yield logged.step, _messages(logged.payload)

    def recovered(self) -> None:
        """Drop what the last checkpoint has from the log again; call once all shards and their pushes were found."""
        self._num_saved_bytes = self.ledger.num_written_bytes - self.ledger.num_bytes_after(self._found)
        for life, version in self._found.items():
            self.ledger.drop(life, version)

    def log(self, life: str) -> "LifeLog":
        """Return where pushes of a life go."""
        return LifeLog(self, life)

    # Checkpoints.

    def checkpoint(self, shards: list[Held]) -> StepInfo:
        """Save all shards, which must not change meanwhile, and drop the pushes that are in them from the log."""
        committed, forks = self.checkpoints.steps(), self._forks()
        num_written_bytes = self.ledger.num_written_bytes
        tables, dense = {}, dict[str, Tensor]()
        told: dict[str, JSON] = {}
        for held in shards:
            name = held.shard.name
            tables[name] = held.shard.state()
            for client, kept in held.kept.items():
                if kept.score_gradients is not None:
                    dense[f"answers/{name}/{client}"] = kept.score_gradients
            told[name] = {
                "born": self._born(name),
                "life": held.life,
                "spec": shard_message(held.shard.spec).SerializeToString(deterministic=True).hex(),
                "version": held.shard.version,
                "steps": {str(client): step for client, step in held.steps.items()},
                "kept": {str(client): [kept.step, kept.version] for client, kept in held.kept.items()},
                "edit": held.edit,
            }
        state = CheckpointState(
            step=committed[-1].step + 1 if committed else 1,
            tables=tables,
            dense=dense,
            attributes={"server": {"id": self.server_id, "shards": told}},
        )
        info = self.checkpoints.save(state)
        self.ledger.put("checkpoint", str(info.step).encode())  # on disk before any later push
        self.saved_versions = {held.shard.name: held.shard.version for held in shards}
        self.saved_at_s = time.monotonic()
        self._num_saved_bytes = num_written_bytes
        for held in shards:
            self.ledger.drop(held.life, held.shard.version)
        for old in forks:
            self.ledger.drop(old)
            self.ledger.delete(f"fork/{old}")
        for other in set(self.ledger.tables()) - {held.life for held in shards}:  # of tables loaded anew or dropped
            self.ledger.drop(other)
        try:
            self.checkpoints.prune(_KEPT_CHECKPOINTS)
        except MfdistError as error:  # the new one counts all the same
            _logger.warning("old checkpoints stay until the next one: %s", error)
        return info

    @property
    def unsaved_bytes(self) -> int:
        """Return how much of the log is newer than the last checkpoint; it may be asked from any thread."""
        return max(0, self.ledger.num_written_bytes - self._num_saved_bytes)

    def close(self) -> None:
        """Let the folder go, with everything on disk."""
        self.ledger.close()
        os.close(self._lock)

    def _forks(self) -> dict[str, str]:
        return {key.removeprefix("fork/"): value.decode() for key, value in self.ledger.items("fork/")}

    def _names(self, life: str) -> list[str]:
        """Return the names that a life has had from this one on."""
        forks, names = self._forks(), [life]
        while names[-1] in forks:
            names.append(forks[names[-1]])
        return names

    def _saved(self) -> CheckpointState | None:
        committed = self.checkpoints.steps()
        last, told = committed[-1].step if committed else 0, self.number("checkpoint")
        if last < told:
            raise CheckpointError(
                f"a server's last checkpoint must be there; the log in {self.folder} goes on from checkpoint {told}, "
                f"and the last one in {self.checkpoints.path} is {last or 'none'}; bring it back, or {_BEGIN_ANEW}"
            )
        if not committed:
            return None
        try:
            return self.checkpoints.load()
        except CheckpointError as error:
            what, _, advice = str(error).rpartition("; ")
            if "another step" not in advice:
                raise
            # That is for a run. Here the log has nothing of what only this checkpoint has.
            raise CheckpointError(
                f"{what}; do not delete it, an older one lacks pushes that were acknowledged; copy it from elsewhere, "
                f"or {_BEGIN_ANEW}"
            ) from error

    def _born(self, table: str) -> str:
        record = self.ledger.get(f"shard/{table}")
        if record is None:
            raise CheckpointError(f'a shard must be known to be saved; table "{table}" is not in {self.folder}')
        return record[:16].decode()

    def _once(self, key: str, value: bytes) -> bytes:
        known = self.ledger.get(key)
        if known is None:
            self.ledger.put(key, value).result()
        return known or value


class LifeLog:
    """The pushes of one life of a shard."""

    def __init__(self, store: Store, life: str) -> None:
        self._store = store
        self._life = life

    def append(self, version: int, client: int, payload: list[bytes]) -> "concurrent.futures.Future[None]":
        """Return what is done once the push is on disk."""
        if self._store.is_logged:
            return self._store.ledger.append(self._life, version, client, _payload(payload))
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done


def _payload(messages: list[bytes]) -> list[bytes]:
    """Return serialised messages as what is logged: each after its length, in 8 bytes."""
    return [part for message in messages for part in (len(message).to_bytes(8, "little"), message)]


def _messages(payload: bytes) -> list[bytes]:
    """Return the serialised messages of a logged push."""
    messages, at, view = [], 0, memoryview(payload)
    while at < len(view):
        end = at + 8 + int.from_bytes(view[at : at + 8], "little")
        messages.append(bytes(view[at + 8 : end]))
        at = end
    return messages


def _told(saved: CheckpointState | None, table: str) -> dict[str, Any] | None:
    """Return what a checkpoint says of a table beside its rows."""
    if saved is None or table not in saved.tables:
        return None
    server: Any = saved.attributes["server"]
    told: dict[str, Any] = server["shards"][table]
    return told


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(f"a server needs a folder for its data; {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 100, 0).decode("utf-8", "replace").strip()
        os.close(lock)
        raise UnavailableError(
            f"one server at a time may use a data folder; {folder} is held by process {holder or 'unknown'}; stop it, "
            "or give this one a folder of its own"
        ) from None
    try:
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(lock)
        raise CheckpointError(
            f"a server must be able to write its data; {folder}: {reason_of(error, folder)}; make room, or see that "
            "the disk works"
        ) from None
    return lock

"""Who calls, and what it may do: bearer tokens with rights, read from a file.

    [tokens.trainer]                      # a client's name, as logs and metrics have it
    sha256 = "9f86d08…"                   # of the token; `new_token` draws one and writes this entry
    rights = ["read", "push"]

A token is sent as the metadata `authorization: Bearer TOKEN`. The file is read again when it changes, so that a token
can be taken back without a restart. Tokens are random and long; a plain digest of them is as good as a slow one.
"""

import hashlib
import hmac
import logging
import os
import secrets
import stat
import threading
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mfdist.errors import ConfigError

Right = Literal["read", "push", "admin"]
ALL_RIGHTS: frozenset[Right] = frozenset(get_args(Right))

#: RPC → the right it needs, as the protocol says. RPCs it does not name need admin; other services', read.
RIGHTS: dict[str, Right] = {
    "Describe": "read",
    "Create": "admin",
    "Train": "admin",
    "Drop": "admin",
    "Join": "push",
    "Lookup": "read",
    "Gather": "read",
    "Push": "push",
    "Step": "push",
    "Barrier": "read",
    "Write": "admin",
    "Save": "admin",
    "Load": "admin",
    "Stats": "read",
    "Promote": "push",
    "Replicate": "admin",
}
SERVICE = "mfdist.table.v1.TableService"
_HEALTH = "grpc.health.v1.Health"  # probes have no tokens, and learn nothing but that the server is there
_LOOK_EVERY_S = 1.0  # between looks at whether the file has changed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Client:
    """Who calls: its name, unique in logs and limits, and its rights."""

    name: str
    rights: frozenset[Right]


def right_for(method: str) -> Right | None:
    """Return the right that a call of `/service/method` needs; None where nobody has to say who it is."""
    service, _, name = method.removeprefix("/").partition("/")
    if service == SERVICE:
        return RIGHTS.get(name, "admin")
    return None if service == _HEALTH else "read"


class Tokens:
    """The tokens of one file. Methods may be called from any thread.

    Raises:
        ConfigError: the file cannot be read, others may read it, or an entry is wrong. The message has no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._clients = _read_tokens(path)
        self._look_at = time.monotonic() + _LOOK_EVERY_S

    def client_of(self, token: str) -> Client | None:
        """Return whose token it is, or None. The time it takes says nothing of how near a wrong token is."""
        self._reload()
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known, client in self._clients:  # all of them, whichever matches
            if hmac.compare_digest(digest, known):
                found = client
        return found

    def _reload(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._look_at:
                return
            self._look_at = now + _LOOK_EVERY_S
            try:
                stamp = _stamp(self._path)
                if stamp == self._stamp:
                    return
                self._stamp, self._clients = stamp, _read_tokens(self._path)
            except ConfigError as error:
                _logger.error("the tokens read before stay in force: %s", error)
            else:
                _logger.info("tokens read again", extra={"fields": {"clients": len(self._clients)}})


def new_token(path: Path, name: str, rights: Iterable[Right]) -> str:
    """Draw a token, write its digest into the file under `name`, and return it; it is kept nowhere else.

    Raises:
        ConfigError: the name is taken or not of letters, digits, - and _, a right is unknown, or the file is wrong.
    """
    chosen = sorted(set(rights))
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f'a client\'s name must be letters, digits, - and _; got "{name}"; choose another')
    known = [client.name for _, client in _read_tokens(path)] if path.exists() else []
    if name in known:
        raise ConfigError(f'a client\'s name must be new; {path} has "{name}"; choose another, or delete that entry')
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    _rights(chosen, name, path)
    quoted = ", ".join(f'"{right}"' for right in chosen)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
        file.write(f'[tokens.{name}]\nsha256 = "{digest}"\nrights = [{quoted}]\n')
    return token


def read_secret(path: Path, what: str) -> bytes:
    """Return the bytes of a file that others must not be able to read; `what` names it in messages.

    Raises:
        ConfigError: it cannot be read, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise ConfigError(
                    f"{what} must not be open to others; {path} has mode {stat.S_IMODE(mode):04o}; chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise ConfigError(f"{what} must be readable; {path}: {error.strerror}; check the path") from None


def bearer_token(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """Return the token of a call's metadata; None where there is none."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                return token.strip()
    return None


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"the token file must be readable; {path}: {error.strerror}; check the path") from None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read_tokens(path: Path) -> list[tuple[str, Client]]:
    """Return (digest, client) of every entry. Messages name entries and never quote what the file holds."""
    try:
        tree = tomllib.loads(read_secret(path, "the token file").decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise ConfigError(f"the token file must be TOML with tables such as [tokens.trainer]; {path} is not") from None
    entries = tree.get("tokens")
    if set(tree) != {"tokens"} or not isinstance(entries, dict) or not entries:
        raise ConfigError(f"the token file must hold tables such as [tokens.trainer] and no others; {path} does not")
    return [_entry(name, entry, path) for name, entry in entries.items()]


def _entry(name: str, entry: object, path: Path) -> tuple[str, Client]:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "rights"}:
        raise ConfigError(f"[tokens.{name}] must have the keys sha256 and rights and no others; see {path}")
    digest = entry["sha256"]
    if not isinstance(digest, str) or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
        raise ConfigError(
            f"tokens.{name}.sha256 must be 64 hexadecimal digits, the token's digest and not the token; see {path}"
        )
    return digest.lower(), Client(name, _rights(entry["rights"], name, path))


def _rights(given: object, name: str, path: Path) -> frozenset[Right]:
    if not isinstance(given, list) or not given or not set(map(str, given)) <= ALL_RIGHTS:
        raise ConfigError(f'tokens.{name}.rights must be a list of "read", "push" and "admin"; see {path}')
    return frozenset(given)

"""The only file that imports obstore: steps in an object store, such as s3://BUCKET/PREFIX.

    PREFIX/step-000000100/…            committed once its manifest is there, which is written last, by one request
    PREFIX/step-000000200-2/…          step 200, saved again
    PREFIX/.writer.lock                held by the one writer, see `lease.py`

Where a file system links, the store copies, without the bytes passing here: every step is whole by itself. Address and
credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …). The store must know conditional writes.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

from mfdist.checkpoint.durability import Bytes
from mfdist.checkpoint.folder import Folder
from mfdist.checkpoint.layout import parse_step_name, step_name
from mfdist.checkpoint.lease import LEASE_S, Lease
from mfdist.checkpoint.lock import LOCK_NAME
from mfdist.checkpoint.manifest import MANIFEST, Manifest
from mfdist.checkpoint.series import check_all_there
from mfdist.errors import CheckpointError, ConfigError


class ObjectFolder:
    """A prefix of an object store; see `Folder`."""

    def __init__(self, store: "_Store", name: str) -> None:
        self._store = store
        self._name = name

    @property
    def name(self) -> str:
        """Return its own name."""
        return self._name

    @property
    def path(self) -> str:
        """Return its URL."""
        return f"{self._store.url}/{self._name}"

    def is_there(self) -> bool:
        """Say yes: a prefix needs no making."""
        return True

    def make(self, names: list[str]) -> None:
        """Do nothing: prefixes need no making."""

    def write(self, name: str, *parts: Bytes, is_lasting: bool = True) -> None:
        """Put an object; it lasts once it is there."""
        self._store.put(self._key(name), parts[0] if len(parts) == 1 else b"".join(parts))

    def sync(self) -> None:
        """Do nothing: objects last once they are there."""

    def close(self) -> None:
        """Do nothing, likewise."""

    def read(self, name: str) -> bytes:
        """Return an object."""
        return bytes(self._store.get(self._key(name)))

    def read_into(self, name: str, buffer: memoryview) -> int:
        """Fill `buffer` with an object as far as it goes; return the object's size."""
        content = self._store.get(self._key(name))
        part = content[: len(buffer)]
        buffer[: len(part)] = part
        return len(content)

    def share(self, name: str, source: Folder) -> bool:
        """Have the store copy another folder's object."""
        with contextlib.suppress(OSError):
            self._store.copy(f"{source.name}/{name}", self._key(name))
            return True
        return False

    def files(self) -> dict[str, int]:
        """Return name → size of everything inside."""
        return {key.removeprefix(f"{self._name}/"): size for key, size in self._store.objects(f"{self._name}/")}

    def remove(self, name: str = "") -> None:
        """Delete what begins with a name, or all; what cannot be deleted stays."""
        with contextlib.suppress(OSError):
            self._store.delete(
                [key for key, _ in self._store.objects(f"{self._key(name)}/" if name else f"{self._name}/")]
            )

    def _key(self, name: str) -> str:
        return f"{self._name}/{name}"


class ObjectSeries:
    """The steps under an URL; see `StepSeries`."""

    def __init__(self, url: str, *, lease_s: float = LEASE_S) -> None:
        self._store = _Store(url.rstrip("/"))
        self._lease_s = lease_s
        self._lease: Lease | None = None

    @property
    def path(self) -> str:
        """Return the URL."""
        return self._store.url

    def is_there(self) -> bool:
        """Say yes: a prefix needs no making."""
        return True

    @contextlib.contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Keep other writers out; see `StepSeries`."""
        if self._lease is not None:
            yield
            return
        holder = f"pid {os.getpid()} on {socket.gethostname()}"
        with _explained(f"cannot write to {self.path}"):
            self._lease = Lease(_LockObject(self._store), self.path, holder, self._lease_s)
        try:
            yield
        finally:
            self._lease.release()
            self._lease = None

    def begin(self, step: int) -> ObjectFolder:
        """Return a prefix that was not there; readers pass it over as long as it has no manifest."""
        taken = [parsed[1] for name in self._names() if (parsed := parse_step_name(name)) and parsed[0] == step]
        return self.folder(step_name(step, max(taken, default=0) + 1))

    def folder(self, name: str) -> ObjectFolder:
        """Return a folder by its name."""
        return ObjectFolder(self._store, name)

    def commit(self, step: int, folder: Folder, manifest: Manifest) -> Folder:
        """Put the manifest, the last object of a step; see `StepSeries`."""
        check_all_there(folder, manifest.file_sizes)
        if self._lease is None or not self._lease.is_held():
            raise CheckpointError(
                f"a writer must hold the lock when it commits; another has taken {self.path} over meanwhile; "
                "let one of the two write."
            )
        self._store.put(f"{folder.name}/{MANIFEST}", manifest.to_bytes(), mode="create")
        with contextlib.suppress(CheckpointError):  # the next writer cleans what cannot be deleted now
            self.clean()
        return folder

    def clean(self) -> None:
        """Remove what dead writers left, and superseded steps."""
        committed = self.revisions()
        latest = {revisions[max(revisions)].name for revisions in committed.values()}
        for name in self._names():
            if name not in latest:
                self.remove(self.folder(name))

    def remove(self, folder: Folder) -> None:
        """Remove a step, its manifest first, so that nobody takes it for whole."""
        with _explained(f"cannot remove {folder.path}"):
            self._store.delete([f"{folder.name}/{MANIFEST}"])
            folder.remove()

    def revisions(self) -> dict[int, dict[int, Folder]]:
        """Return step → revision → folder of what is committed."""
        found: dict[int, dict[int, Folder]] = {}
        with _explained(f"cannot list {self.path}"):
            for name in self._names():
                step, revision = parse_step_name(name) or (0, 0)
                if self._store.is_there(f"{name}/{MANIFEST}"):
                    found.setdefault(step, {})[revision] = self.folder(name)
        return found

    def _names(self) -> list[str]:
        return [name for name in self._store.prefixes() if parse_step_name(name) is not None]


def open_object_folder(url: str) -> ObjectFolder:
    """Return the folder at an URL."""
    parent, _, name = url.rstrip("/").rpartition("/")
    return ObjectFolder(_Store(parent), name)


class _Store:
    """Objects under an URL. What fails raises OSError, as a file system's calls do."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
        except ImportError as error:
            raise ConfigError("an object store needs a package more: pip install mfdist[s3]") from error
        self.url = url
        self._obstore = obstore
        try:
            self._store: Any = obstore.store.from_url(url)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise ConfigError(f"a checkpoint URL must be such as s3://BUCKET/PREFIX; got {url} ({error}).") from error

    def put(self, key: str, content: Bytes, mode: Any = "overwrite") -> str:
        """Put an object; return what tells this version from others."""
        with self._failing_as_os_error(key):
            return str(self._obstore.put(self._store, key, content, mode=mode, use_multipart=False)["e_tag"])

    def get(self, key: str) -> memoryview:
        with self._failing_as_os_error(key):
            return memoryview(self._obstore.get(self._store, key).bytes())

    def version(self, key: str) -> str:
        with self._failing_as_os_error(key):
            return str(self._obstore.head(self._store, key)["e_tag"])

    def is_there(self, key: str) -> bool:
        try:
            self.version(key)
        except FileNotFoundError:
            return False
        return True

    def copy(self, source: str, target: str) -> None:
        with self._failing_as_os_error(source):
            self._obstore.copy(self._store, source, target)

    def delete(self, keys: list[str]) -> None:
        with self._failing_as_os_error(self.url):
            if keys:
                self._obstore.delete(self._store, keys)

    def objects(self, prefix: str) -> list[tuple[str, int]]:
        with self._failing_as_os_error(prefix):
            found = [entry for batch in self._obstore.list(self._store, prefix) for entry in batch]
        return [(str(entry["path"]), int(entry["size"])) for entry in found]

    def prefixes(self) -> list[str]:
        with self._failing_as_os_error(self.url):
            return [str(name) for name in self._obstore.list_with_delimiter(self._store)["common_prefixes"]]

    @contextlib.contextmanager
    def _failing_as_os_error(self, key: str) -> Iterator[None]:
        errors = self._obstore.exceptions
        try:
            yield
        except (errors.AlreadyExistsError, errors.PreconditionError) as error:
            raise FileExistsError(errno.EEXIST, _first_line(error), key) from error
        except errors.BaseError as error:
            raise OSError(errno.EIO, _first_line(error), key) from error


class _LockObject:
    """The object a lease is kept in; see `lease.LeaseObject`."""

    def __init__(self, store: _Store) -> None:
        self._store = store

    def create(self, content: bytes) -> str:
        return self._store.put(LOCK_NAME, content, mode="create")

    def update(self, content: bytes, version: str) -> str:
        return self._store.put(LOCK_NAME, content, mode={"e_tag": version})

    def read(self) -> tuple[bytes, str]:
        return bytes(self._store.get(LOCK_NAME)), self._store.version(LOCK_NAME)

    def delete(self) -> None:
        self._store.delete([LOCK_NAME])


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if isinstance(error, ConnectionError):  # UnavailableError: another writer
            raise
        raise CheckpointError(
            f"an object store must answer; {what} ({error.strerror}); check address, bucket and credentials."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

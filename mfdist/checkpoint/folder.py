"""Where a step's files are: a folder of a file system, or a prefix of an object store."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Protocol, TypeAlias

from mfdist.checkpoint.durability import Bytes, UnsyncedFiles, write_file
from mfdist.checkpoint.reading import read_file


class Folder(Protocol):
    """The files of one step; their names are paths inside it. Every method may be called from several threads.

    What fails raises OSError; a file that is not there raises FileNotFoundError.
    """

    @property
    def name(self) -> str:
        """Return its own name."""

    @property
    def path(self) -> Path | str:
        """Return where it is, an URL as text."""

    def is_there(self) -> bool:
        """Say whether it exists, which an object store's always does."""

    def make(self, names: list[str]) -> None:
        """Make inner folders, where files are about to be written."""

    def write(self, name: str, *parts: Bytes, is_lasting: bool = True) -> None:
        """Write a new file; if it is to last, its contents do after `sync`, which raises what the disk failed with."""

    def sync(self) -> None:
        """Wait until the contents of all files last that were written to last."""

    def close(self) -> None:
        """Let go of what was written and not synced; it may be lost."""

    def read(self, name: str) -> bytes:
        """Return a file's contents."""

    def read_into(self, name: str, buffer: memoryview) -> int:
        """Fill `buffer` with a file's contents as far as they go; return the file's size."""

    def share(self, name: str, source: "Folder") -> bool:
        """Give this folder the file `name` of another of its kind without writing it; say whether that was possible."""

    def files(self) -> dict[str, int]:
        """Return name → size of everything inside."""

    def remove(self, name: str = "") -> None:
        """Remove an inner folder, or all, as far as that is possible."""


class LocalFolder:
    """A folder of a file system; see `Folder`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unsynced = UnsyncedFiles()

    @property
    def name(self) -> str:
        """Return its own name."""
        return self._path.name

    @property
    def path(self) -> Path:
        """Return where it is."""
        return self._path

    def is_there(self) -> bool:
        """Say whether it exists."""
        return self._path.is_dir()

    def make(self, names: list[str]) -> None:
        """Make inner folders."""
        for name in names:
            (self._path / name).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, *parts: Bytes, is_lasting: bool = True) -> None:
        """Write a new file; its name lasts once the directory is synced."""
        path = self._path / name
        fd = write_file(path, *parts)
        if is_lasting:
            self._unsynced.add(fd, path)
        else:
            os.close(fd)

    def sync(self) -> None:
        """Wait until the contents of all files last that were written to last."""
        self._unsynced.sync()

    def close(self) -> None:
        """Let go of what was written and not synced."""
        self._unsynced.close()

    def read(self, name: str) -> bytes:
        """Return a file's contents."""
        return (self._path / name).read_bytes()

    def read_into(self, name: str, buffer: memoryview) -> int:
        """Fill `buffer` with a file's contents as far as they go; return the file's size."""
        return read_file(self._path / name, buffer)

    def share(self, name: str, source: Folder) -> bool:
        """Link to another folder's file."""
        with contextlib.suppress(OSError):  # too many links, another file system, or it was removed
            os.link(Path(source.path) / name, self._path / name)
            return True
        return False

    def files(self) -> dict[str, int]:
        """Return name → size of everything inside."""
        found = {}
        for folder, _, names in os.walk(self._path):
            for name in names:
                path = Path(folder, name)
                found[path.relative_to(self._path).as_posix()] = path.stat().st_size
        return found

    def remove(self, name: str = "") -> None:
        """Remove an inner folder, or all; what cannot be removed stays."""
        shutil.rmtree(self._path / name, ignore_errors=True)


#: How callers name a folder: its path, its URL, or itself.
AnyFolder: TypeAlias = Path | str | Folder


def is_url(place: AnyFolder) -> bool:
    """Say whether a place is in an object store."""
    return isinstance(place, str) and "://" in place


def open_folder(place: AnyFolder) -> Folder:
    """Return the folder at a path or an URL."""
    if isinstance(place, str) and is_url(place):
        from mfdist.checkpoint.object_store import open_object_folder

        return open_object_folder(place)
    return LocalFolder(Path(place)) if isinstance(place, Path | str) else place

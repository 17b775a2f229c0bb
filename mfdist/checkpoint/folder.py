"""Where a step's files are: a folder of a file system, or a prefix of an object store."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Protocol, TypeAlias

from mfdist.checkpoint.durability import Bytes, write_file


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
        """Write a new file and, if it is to last, wait until its contents do."""

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
        """Write a new file; its name lasts once the folder is synced."""
        write_file(self._path / name, *parts, is_lasting=is_lasting)

    def read(self, name: str) -> bytes:
        """Return a file's contents."""
        return (self._path / name).read_bytes()

    def read_into(self, name: str, buffer: memoryview) -> int:
        """Fill `buffer` with a file's contents as far as they go; return the file's size."""
        fd = os.open(self._path / name, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            left = buffer[:size]
            while left and (read := os.readv(fd, [left])):
                left = left[read:]
            return size - len(left)
        finally:
            os.close(fd)

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

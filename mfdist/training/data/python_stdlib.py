"""Text that is wherever Python is: its documentation topics and the sources of its standard library."""

import hashlib
import os
import platform
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from mfdist.errors import DataError
from mfdist.training.data.documents import Document, pieces
from mfdist.training.data.file_text import text_blocks

#: Left out: what is not the library's own (tests, installed packages), what some distributions package apart from
#: Python, so that the text is nearly the same everywhere, and modules that are tables of numbers.
_LEFT_OUT = frozenset(
    [
        "__pycache__",
        "config",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    ]
)


class PythonStdlib:
    """The running Python's documentation topics and library, about 8 MB of English and Python."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._files = list(_library_files(self._root))
        self._topics = sorted(topics.items())
        self.position_bytes = 0
        self.num_bytes: int | None = sum(map(len, topics.values())) + sum(size for _, size in self._files)

    @property
    def identity(self) -> str:
        """Python's version and the names and sizes of its files."""
        listing = hashlib.sha256(repr((self._topics, self._files)).encode()).hexdigest()
        return f"python-stdlib {platform.python_version()} {listing}"

    def documents(self, *, on_skip: Callable[[str], None], shuffle_seed: int | None = None) -> Iterator[Document]:
        """Yield the topics, then the modules, sorted by name; see `Source.documents`."""
        self.position_bytes = 0
        files = list(self._files)
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(files)
        for topic, text in self._topics:
            yield Document(f"topics/{topic}", text)
            self.position_bytes += len(text)
        for name, size in files:
            try:
                yield from pieces(name, text_blocks(self._root / name))
            except DataError as error:
                on_skip(str(error))
            self.position_bytes += size


def _library_files(root: Path) -> Iterator[tuple[str, int]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name.partition("-")[0] not in _LEFT_OUT and name not in _LEFT_OUT
        )
        for name in sorted(names):
            path = Path(folder, name)
            # Links lead out of the library, and _sysconfigdata describes the machine it was built on.
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path.stat().st_size

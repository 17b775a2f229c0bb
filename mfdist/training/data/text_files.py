"""Text files: a folder, searched for files whose suffix says that they hold text, or one file."""

import hashlib
import json
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mfdist.errors import DataError
from mfdist.training.data.documents import Document, pieces, record_text, text_pieces
from mfdist.training.data.file_text import BLOCK_BYTES, COMPRESSIONS, decompressed, readable, text_blocks

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")

#: A line of a .jsonl file must be held in memory to be understood; a longer one is skipped.
MAX_LINE_BYTES = 2**24

_PARQUET_ROWS_AT_A_TIME = 64
_RECORD_SKIPS_TOLD_PER_FILE = 3

OnSkip = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _File:
    name: str  # relative to the folder that was given, with forward slashes
    path: Path
    num_bytes: int
    mtime_ns: int


class TextFiles:
    """The text files below a folder, sorted by relative path, or a single file.

    Suffixes decide what a file is: see TEXT_SUFFIXES, RECORD_SUFFIXES and COMPRESSIONS; other files are passed over,
    but a single file of another suffix is read as text. Links are followed, each folder is entered once, and hidden
    files and folders (.git, .venv) are passed over.
    """

    def __init__(
        self, source: str, *, text_field: str, suffixes: tuple[str, ...] | None = TEXT_SUFFIXES + RECORD_SUFFIXES
    ) -> None:
        """List the files, reading none.

        Args:
            source: path of a folder or file; `~` is the home folder.
            text_field: field of the text in records.
            suffixes: what to look for in a folder; None lists every file.

        Raises:
            DataError: there is no such path.
        """
        self._root = Path(source).expanduser()
        self._text_field = text_field
        self._suffixes = suffixes
        self._problems: list[str] = []
        if self._root.is_dir():
            self._files = sorted(self._search(), key=lambda file: file.name)
        elif self._root.exists():
            self._files = [file for file in [self._examine(self._root, self._root.name)] if file]
        else:
            raise DataError(
                f"data.source must be a folder or file of text, hf:NAME or python-stdlib; there is no {self._root}"
                f" (looked from {Path.cwd()}); correct the path"
            )
        self.num_bytes: int | None = sum(file.num_bytes for file in self._files)
        self._finished_bytes = 0
        self._opened: BinaryIO | None = None

    @property
    def identity(self) -> str:
        """The path, and the names, sizes and times of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name}\0{file.num_bytes}\0{file.mtime_ns}\0".encode())
        return f"files {_printable(self._root.resolve())} {self._text_field} {digest.hexdigest()}"

    @property
    def position_bytes(self) -> int:
        """Bytes of the files, as they lie on disk, that were read."""
        inside = self._opened.tell() if self._opened is not None and not self._opened.closed else 0
        return self._finished_bytes + inside

    def documents(self, *, on_skip: OnSkip, shuffle_seed: int | None = None) -> Iterator[Document]:
        """Yield one document a file, or one a record; see `Source.documents`."""
        problems: list[str] = []

        def skip(message: str) -> None:
            problems[1:] = [message]  # the first and the last are enough for the error below
            on_skip(message)

        for problem in self._problems:
            skip(problem)
        files = list(self._files)
        self._check_libraries()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(files)
        self._finished_bytes = 0
        found = False
        for file in files:
            try:
                for document in self._read(file, skip):
                    found = True
                    yield document
            except DataError as error:
                skip(str(error))
            self._opened = None
            self._finished_bytes += file.num_bytes
        if not found:
            looked_for = ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES)
            reason = f"; {problems[0]}" if problems else ""
            raise DataError(
                f"data.source must hold text; nothing usable in {_printable(self._root)}:"
                f" looked for {looked_for} and these with {', '.join(COMPRESSIONS)},"
                f" found {len(files)} such files{reason}"
            )

    def _check_libraries(self) -> None:
        """Fail rather than train on what is left without the files that cannot be read."""
        path = next((file.path for file in self._files if _suffixes_of(file.path.name)[0] == ".parquet"), None)
        if path is not None:
            try:
                import pyarrow  # noqa: F401
            except ImportError:
                raise DataError(
                    f"reading {path} needs the package pyarrow, which is not installed; pip install 'mfdist[parquet]'"
                ) from None

    def _search(self) -> Iterator[_File]:
        entered = set()

        def tell(error: OSError) -> None:
            self._problems.append(f"folder {error.filename} cannot be read: {error.strerror}; it is left out")

        for folder, folders, names in os.walk(self._root, onerror=tell, followlinks=True):
            status = Path(folder).stat()
            key = (status.st_dev, status.st_ino)
            if key in entered:  # a link that leads back up, or to a folder that was seen
                folders.clear()
                continue
            entered.add(key)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                wanted = self._suffixes is None or _suffixes_of(name)[0] in self._suffixes
                if wanted and not name.startswith("."):
                    path = Path(folder, name)
                    file = self._examine(path, path.relative_to(self._root).as_posix())
                    if file:
                        yield file

    def _examine(self, path: Path, name: str) -> _File | None:
        try:
            status = path.stat()
        except OSError as error:
            self._problems.append(f"{_printable(path)} cannot be read: {error.strerror}; it is left out")
            return None
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited on for ever
            self._problems.append(
                f"{_printable(path)} must be an ordinary file; it is a pipe or a device and is left out"
            )
            return None
        return _File(_printable(name), path, status.st_size, status.st_mtime_ns)

    def _read(self, file: _File, on_skip: OnSkip) -> Iterator[Document]:
        suffix, compression = _suffixes_of(file.path.name)
        with readable(file.path), file.path.open("rb") as raw:
            self._opened = raw if suffix != ".parquet" else None
            stream = decompressed(raw, compression)
            if suffix == ".jsonl":
                yield from _records(file, _json_lines(file.path, stream), self._text_field, on_skip)
            elif suffix == ".parquet":
                rows = _parquet_rows(file.path, stream, compression, self._text_field)
                yield from _records(file, rows, self._text_field, on_skip)
            else:
                yield from pieces(file.name, text_blocks(file.path, stream))


def _suffixes_of(name: str) -> tuple[str, str]:
    path = Path(name.lower())
    return (Path(path.stem).suffix, path.suffix) if path.suffix in COMPRESSIONS else (path.suffix, "")


def _printable(path: str | Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _records(file: _File, records: Iterator[tuple[str, Any]], text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    """Yield the text of records; `records` gives each with its place ("line 3"), or the error that it is."""
    num_skipped = 0
    for place, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            text = record_text(record, text_field)
        except DataError as error:
            num_skipped += 1
            if num_skipped <= _RECORD_SKIPS_TOLD_PER_FILE:
                on_skip(f"{_printable(file.path)} {place}: {error}; it is left out")
            continue
        yield from text_pieces(f"{file.name}:{place.rpartition(' ')[2]}", text)
    if num_skipped > _RECORD_SKIPS_TOLD_PER_FILE:
        on_skip(f"{_printable(file.path)}: {num_skipped} records are left out in all")


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"line {number}"
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK_BYTES)
            yield place, DataError(f"a line must have at most {MAX_LINE_BYTES >> 20} MiB")
        elif line.strip():
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, DataError(f"a line must be JSON in UTF-8: {error}")


def _parquet_rows(path: Path, stream: BinaryIO, compression: str, text_field: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        if compression:  # parquet is read from its end, which a compressed stream cannot seek to
            shutil.copyfileobj(stream, unpacked, BLOCK_BYTES)
            unpacked.seek(0)
        try:
            table = pyarrow.parquet.ParquetFile(
                unpacked if compression else stream, buffer_size=BLOCK_BYTES, pre_buffer=False
            )
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{path}: no column {text_field!r}; columns are {', '.join(names[:8])}; set data.text_field"
                )
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS_AT_A_TIME, columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path} must be a parquet file; reading it failed: {' '.join(str(error).split())[:200]}"
            ) from None

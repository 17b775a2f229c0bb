"""Documents: named pieces of text, streamed from a source with flat memory and in the same order every time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mfdist.errors import DataError

#: Longest text of one `Document`, in characters; a longer document comes as several pieces.
MAX_PIECE_CHARS = 2**20


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or a piece of a long one; pieces follow each other and only the last has `is_end`.

    The concatenated pieces are the document, exactly.
    """

    name: str  # the same for all pieces; independent of where the source lies
    text: str
    is_end: bool = True


class Source(Protocol):
    """Where documents come from. It may be read several times and gives the same documents each time."""

    @property
    def identity(self) -> str:
        """What the documents depend on (names, sizes, times, versions), found without reading them."""

    @property
    def num_bytes(self) -> int | None:
        """Size of what is read, as `position_bytes` counts it; None where it is not known beforehand."""

    @property
    def position_bytes(self) -> int:
        """How much of the source the iterator in use has read."""

    def documents(self, *, on_skip: Callable[[str], None], shuffle_seed: int | None = None) -> Iterator[Document]:
        """Yield every document, in a fixed order.

        Args:
            on_skip: told, in one line that names it, of everything that is not taken.
            shuffle_seed: visits the source's files in an order fixed by this seed, for sampling; None: sorted.

        Raises:
            DataError: nothing usable was found, or a library that is needed is missing.
        """


def open_source(source: str, *, text_field: str = "text") -> Source:
    """Return the source that a configuration names.

    Args:
        source: `python-stdlib`, `hf:NAME[:CONFIG[:SPLIT]]`, or the path of a folder or file.
        text_field: field that holds the text of structured records (.jsonl, .parquet, Hugging Face).

    Raises:
        DataError: there is no such thing.
    """
    # The sources import this module, and one of them a heavy library: they are imported where they are wanted.
    if source == "python-stdlib":
        from mfdist.training.data.python_stdlib import PythonStdlib

        return PythonStdlib()
    if source.startswith("hf:"):
        from mfdist.training.data.hugging_face import HuggingFaceDataset

        return HuggingFaceDataset(source, text_field=text_field)
    from mfdist.training.data.text_files import TextFiles

    return TextFiles(source, text_field=text_field)


def iter_documents(source: str, *, text_field: str = "text", on_skip: Callable[[str], None]) -> Iterator[Document]:
    """Yield the documents of a source that is named as in `open_source`.

    Raises:
        DataError: there is no such source, or nothing in it can be used.
    """
    yield from open_source(source, text_field=text_field).documents(on_skip=on_skip)


def pieces(name: str, blocks: Iterator[str]) -> Iterator[Document]:
    """Join blocks of text and cut them into pieces of at most MAX_PIECE_CHARS, before white space where there is some.

    Yields nothing for an empty document. If `blocks` raises DataError, what came before is closed as a document first.
    """
    pending = ""
    failure: DataError | None = None
    while True:
        try:
            block = next(blocks, None)
        except DataError as error:  # raised again below, once the document is closed
            block, failure = None, error
        if block is None:
            break
        pending += block
        while len(pending) > MAX_PIECE_CHARS:
            cut = max(pending.rfind(space, MAX_PIECE_CHARS // 2, MAX_PIECE_CHARS + 1) for space in " \n\t")
            cut = cut if cut > 0 else MAX_PIECE_CHARS
            yield Document(name, pending[:cut], is_end=False)
            pending = pending[cut:]
    if pending:
        yield Document(name, pending)
    if failure is not None:
        raise failure


def text_pieces(name: str, text: str) -> Iterator[Document]:
    """Cut a document that is in memory as `pieces` does."""
    yield from pieces(name, (text[start : start + MAX_PIECE_CHARS] for start in range(0, len(text), MAX_PIECE_CHARS)))


def record_text(record: object, text_field: str) -> str:
    """Return the text of one structured record.

    Raises:
        DataError: the record is no mapping, or the field is missing or not text; the message fits after "line 3: ".
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with a field {text_field!r}; got {type(record).__name__}")
    if text_field not in record:
        fields = ", ".join(sorted(map(str, record))[:8]) or "none"
        raise DataError(f"no field {text_field!r}; fields are {fields}; set data.text_field")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"field {text_field!r} must hold text; got {type(text).__name__}; set data.text_field")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no UTF-8 text can hold
        raise DataError(f"field {text_field!r} must hold text; got half a surrogate pair") from None
    return text

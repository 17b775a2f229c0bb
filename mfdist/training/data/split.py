"""The split into training and validation: by document, by a hash of its name, so that it stays when files are added."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from mfdist.errors import DataError

#: Each side must hold an input and a target.
_MIN_TOKENS = 2

_COPY_BYTES = 2**20


def is_held_out(name: str, seed: int, fraction: float) -> bool:
    """Return whether the document of this name is held out."""
    return _draw(name, seed) < fraction


class SplitWriter:
    """Writes documents to the training or the validation file.

    Where no document falls to one of the sides, which is likely with few documents, all are taken together, and the one
    of the lowest draw is held out if it is at most half of the text; else, as with a single document, the last
    `fraction` of the text is.
    """

    def __init__(self, train: Path, validation: Path, dtype: np.dtype[Any], *, seed: int, fraction: float) -> None:
        """Create both files; `fraction` of the documents is held out."""
        self._dtype, self._seed, self._fraction = dtype, seed, fraction
        self._paths = train, validation
        self._open_files = ExitStack()
        self._files = [self._open_files.enter_context(path.open("wb")) for path in self._paths]
        self._num_tokens = [0, 0]
        self._name: str | None = None
        self._side = 0
        self._span = (0, 0)  # first token and length of the document being written, in its file
        self._draw = 0.0
        self._lowest = (2.0, (0, 0))  # draw and span of the document with the lowest draw

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def append(self, name: str, tokens: Sequence[int]) -> None:
        """Append a document, or the next piece of the document that was appended last.

        Raises:
            OSError: writing failed.
        """
        if name != self._name:
            self._name, self._draw = name, _draw(name, self._seed)
            self._side = int(self._draw < self._fraction)
            self._span = (self._num_tokens[self._side], 0)
        self._files[self._side].write(np.asarray(tokens, dtype=self._dtype).tobytes())
        self._num_tokens[self._side] += len(tokens)
        self._span = (self._span[0], self._span[1] + len(tokens))
        if self._draw <= self._lowest[0]:
            self._lowest = (self._draw, self._span)

    def finish(self) -> list[str]:
        """Complete both files, so that neither is empty.

        Returns:
            Remarks about the split that its user should know.

        Raises:
            DataError: there is too little text for two sides.
            OSError: writing failed.
        """
        self._open_files.close()
        total = sum(self._num_tokens)
        if total < 2 * _MIN_TOKENS:
            raise DataError(f"text must have at least {2 * _MIN_TOKENS} tokens; got {total}; give more text")
        if min(self._num_tokens) < _MIN_TOKENS:
            return [self._hold_out(max(self._num_tokens))]
        share = self._num_tokens[1] / total
        if share > 0.5:
            return [f"the held-out documents are {share:.0%} of the text; another data.seed splits it otherwise"]
        return []

    def _hold_out(self, total: int) -> str:
        """Gather everything in the training file and move a part of its `total` tokens to the validation file."""
        train, validation = self._paths
        if self._num_tokens[0] < self._num_tokens[1]:
            validation.replace(train)
        start, length = self._lowest[1]
        what = "the document of the lowest draw"
        if not _MIN_TOKENS <= length <= total // 2:
            length = min(max(_MIN_TOKENS, round(total * self._fraction)), total // 2)
            start = total - length
            what = "the end of the text"
        size = self._dtype.itemsize
        with train.open("r+b") as kept, validation.open("wb") as held:
            for block in _blocks(kept, start * size, (start + length) * size):
                held.write(block)
            end = start * size
            for block in _blocks(kept, (start + length) * size, total * size):
                kept.seek(end)
                kept.write(block)
                end += len(block)
            kept.truncate(end)
        share = f"{length / total:.1%} of the tokens"
        return f"documents are so few that none, or all, fell to validation; held out instead: {what}, {share}"


def _blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        file.seek(start)
        block = file.read(min(_COPY_BYTES, stop - start))
        yield block
        start += len(block)


def _draw(name: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the document's name and the seed alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

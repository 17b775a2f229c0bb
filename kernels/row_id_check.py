"""Turns a row id outside its table into an error, on the CPU at once and on a GPU without waiting for it.

GPU kernels never touch memory outside the table; on a bad id they write NaN to what the id would have fed and leave the
id in a word of pinned host memory. Every later call reads those words, which costs next to nothing, and `check_errors`
waits for the device first. So a bad id is reported by the first call after the kernel has run, at the latest; but not
within an exchange between ranks, where others would wait for the one that left: there it is `kept` for the next call.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mfdist.errors import RowIdError

#: A word that holds this has seen no bad id.
NOTHING = -(2**63)
_MAX_WORDS = 4096
#: Dtypes that hold no negative id, and how many others.
_NUM_VALUES = {torch.uint8: 1 << 8, torch.uint16: 1 << 16}


def row_id_error(row_id: int, limit: int, name: str, *, is_code: bool, lookup: int | None = None) -> RowIdError:
    """Return the error for one bad id.

    Args:
        row_id: the id or code as it was given.
        limit: the first id past the end: the table's rows, or the codes of one lookup.
        name: the table's name.
        is_code: the id is a code that counts from its lookup's own first row.
        lookup: which of the token's K lookups, where it is known.
    """
    at = "" if lookup is None else f" at lookup {lookup}"
    if is_code:
        return RowIdError(
            f'code {row_id}{at} is outside its part of table "{name}" (code_stride={limit}); '
            "codes come from sign_hash, with bits no more than log2(code_stride)"
        )
    return RowIdError(
        f'row id {row_id}{at} is outside table "{name}" (num_rows={limit}); give ids from 0 to num_rows - 1'
    )


def can_be_bad(row_ids: Tensor, limit: int) -> bool:
    """Return whether an id's dtype can hold one that is not below `limit`."""
    return limit < _NUM_VALUES.get(row_ids.dtype, limit + 1)


def bad_id_error(row_ids: Tensor, limit: int, name: str, *, is_code: bool) -> RowIdError | None:
    """Return the error for the first bad id of [N, K], or None; on a GPU it waits for the device."""
    if not row_ids.numel() or not can_be_bad(row_ids, limit):
        return None
    if row_ids.dtype == torch.uint16:  # which torch neither compares nor finds the largest of
        row_ids = row_ids.int()
    low, high = (int(value) for value in torch.aminmax(row_ids))
    if low >= 0 and high < limit:
        return None
    place = int(((row_ids < 0) | (row_ids >= limit)).flatten().nonzero()[0])
    found = int(row_ids.flatten()[place])
    return row_id_error(found, limit, name, is_code=is_code, lookup=place % row_ids.shape[1])


class _PinnedWords:
    """One word of pinned memory for each (table name, limit) that a GPU kernel has been launched for."""

    def __init__(self) -> None:
        self._words: Tensor | None = None
        self._slots: dict[tuple[str, int, bool], int] = {}
        self._lock = threading.Lock()
        self.is_kept = False

    def word(self, name: str, limit: int, is_code: bool) -> Tensor:
        """Return the word to hand to a kernel; past `_MAX_WORDS` tables, the last word is shared."""
        key = (name, limit, is_code)
        with self._lock:
            if self._words is None:
                # Two to a row, so that every word is aligned alike: Triton compiles a kernel for each alignment.
                words = torch.full((_MAX_WORDS, 2), NOTHING, dtype=torch.int64, device="cpu")
                self._words = words.pin_memory() if torch.cuda.is_available() else words
            slot = self._slots.setdefault(key, min(len(self._slots), _MAX_WORDS - 1))
            return self._words[slot, :1]

    def raise_if_any(self) -> None:
        """Raise for the first word that holds a bad id, and forget all of them."""
        if self._words is None:
            return
        words = self._words.numpy()[: len(self._slots), 0]
        if (words == NOTHING).all():
            return
        with self._lock:
            slot = int((words != NOTHING).argmax())
            row_id = int(words[slot])
            words.fill(NOTHING)
            name, limit, is_code = next(key for key, held in self._slots.items() if held == slot)
        raise row_id_error(row_id, limit, name, is_code=is_code)


_pinned = _PinnedWords()


def error_word(name: str, limit: int, *, is_code: bool) -> Tensor:
    """Raise for a bad id an earlier launch has met, and return the int64 word in which the next one reports its own."""
    if not _pinned.is_kept:
        _pinned.raise_if_any()
    return _pinned.word(name, limit, is_code)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Launch kernels without raising for what earlier ones have met; on whichever thread, as autograd has its own."""
    was_kept, _pinned.is_kept = _pinned.is_kept, True
    try:
        yield
    finally:
        _pinned.is_kept = was_kept


def met_error() -> RowIdError | None:
    """Return the error for a bad id that an earlier launch has met, once; it does not wait for the device."""
    try:
        _pinned.raise_if_any()
    except RowIdError as error:
        return error
    return None


def note_bad_id(row_ids: Tensor, limit: int, name: str, *, is_code: bool) -> None:
    """Leave a bad id in its word as a kernel would, where none is launched because there is nothing to sum.

    A rank that holds no columns of a table is told of bad ids like those that do. It does not wait for the device.
    """
    word = error_word(name, limit, is_code=is_code)
    if not row_ids.numel() or not can_be_bad(row_ids, limit):
        return
    ids = row_ids.long()
    found = ids.where((ids < 0) | (ids >= limit), NOTHING).amax()
    # What an earlier launch has left there and nobody has read stays.
    found = torch.maximum(found, word.to(found.device, non_blocking=True)[0])
    word.copy_(found[None], non_blocking=True)


def check_errors() -> None:
    """Wait for all GPU work and raise for any bad row id it met.

    On the CPU, calls check as they run, and there is nothing to wait for.

    Raises:
        RowIdError: a lookup was given an id outside its table; its outputs hold NaN where that id was used.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    _pinned.raise_if_any()

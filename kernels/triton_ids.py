"""The check of row ids inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def checked(ids, is_wanted, limit, error_word):
    """Return which wanted ids lie in [0, limit), and leave one that does not in the error word.

    Args:
        ids: a block of int64.
        is_wanted: a block of booleans; the others are not looked at.
        limit: the first id past the end.
        error_word: pointer to one int64, which the host reads.
    """
    is_bad = is_wanted & ((ids < 0) | (ids >= limit))
    tl.store(error_word + tl.zeros_like(ids), ids, mask=is_bad)
    return is_wanted & (is_bad == 0)

"""The sum of one row's run of lookups over a slice of columns, and the score gradients of these lookups."""

import triton
import triton.language as tl

from mfdist.kernels.row_gradient.triton_order import lookup_of, score_of
from mfdist.kernels.triton_rows import as_fp32

#: Slices of so many columns or more are summed two lookups at a time; narrower ones by tiles of so many elements.
_ELEMENTS: tl.constexpr = tl.constexpr(512)


@triton.jit
def sum_lookups(
    grad_output, words, grad_scores, values, first_column, is_column,
    start, end, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_ADDED: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return the sum [COLUMNS] of score · grad_output over [start, end) of the order.

    Each lookup's ⟨grad_output, values⟩ is written to grad_scores if HAS_PRODUCTS, or added to what an earlier slice
    left there. The row's pieces may leave nothing to sum, but the word before `end` is always one of the row's, and is
    read in place of any past it.
    """
    IS_BEGUN: tl.constexpr = HAS_PRODUCTS and IS_ADDED
    if COLUMNS >= _ELEMENTS:
        total = _sum_pairs(
            grad_output, words, grad_scores, values, first_column, is_column,
            start, end, D, K, COLUMNS, IS_BEGUN, HAS_PRODUCTS, IS_WHOLE, OFFSET,
        )  # fmt: skip
    else:
        total = _sum_tiles(
            grad_output, words, grad_scores, values, first_column, is_column,
            start, end, D, K, _ELEMENTS // COLUMNS, COLUMNS, IS_BEGUN, HAS_PRODUCTS, IS_WHOLE, OFFSET,
        )  # fmt: skip
    return total


@triton.jit
def _sum_pairs(
    grad_output, words, grad_scores, values, first_column, is_column,
    start, end, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_BEGUN: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum wide slices two lookups at a time: both are read before either is summed, and the next two words before both.

    Two are what registers hold, and their chains of additions, which have to wait for each step, go on side by side.
    """
    total = tl.zeros([COLUMNS], tl.float32)
    last = tl.maximum(end - 1, 0)  # `end` is positive: told so, the compiler's loop is shorter
    word = _words_at(words, start, last)
    other = _words_at(words, start + 1, last)
    for place in range(start, end - 1, 2):
        next_word = _words_at(words, place + 2, last)
        next_other = _words_at(words, place + 3, last)
        grads, product = _parts_of(
            grad_output, grad_scores, word, first_column, is_column, D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
        )
        more, other_product = _parts_of(
            grad_output, grad_scores, other, first_column, is_column, D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
        )
        total = _add_lookup(total, word, grads, values, product, grad_scores, IS_BEGUN, HAS_PRODUCTS)
        total = _add_lookup(total, other, more, values, other_product, grad_scores, IS_BEGUN, HAS_PRODUCTS)
        word, other = next_word, next_other
    if (end - start) % 2 == 1:
        grads, product = _parts_of(
            grad_output, grad_scores, word, first_column, is_column, D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
        )
        total = _add_lookup(total, word, grads, values, product, grad_scores, IS_BEGUN, HAS_PRODUCTS)
    return total


@triton.jit
def _parts_of(
    grad_output, grad_scores, word, first_column, is_column, D,
    K: tl.constexpr, COLUMNS: tl.constexpr, IS_BEGUN: tl.constexpr, IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return the grad_output [COLUMNS] of one lookup, or [LOOKUPS, COLUMNS] of several, and score gradients so far."""
    lookup = lookup_of(word)
    token = (lookup // K).to(OFFSET)
    c = tl.arange(0, COLUMNS)
    if len(word.shape) == 0:
        # One address, from which those of all threads and of their columns lie at distances that are constants.
        places = grad_output + (token * D + first_column).to(tl.int64) + c
    else:
        places = grad_output + (token[:, None] * D + (first_column + c)[None, :])
    grads = tl.load(places) if IS_WHOLE else tl.load(places, mask=is_column, other=0.0)
    product = tl.load(grad_scores + lookup) if IS_BEGUN else 0.0
    return grads, product


@triton.jit
def _add_lookup(total, word, grads, values, product, grad_scores, IS_BEGUN: tl.constexpr, HAS_PRODUCTS: tl.constexpr):
    """Return the total with one lookup added, and write its score gradient."""
    wide = as_fp32(grads)
    if HAS_PRODUCTS:
        found = tl.sum(wide * values, axis=0)
        tl.store(grad_scores + lookup_of(word), found + product if IS_BEGUN else found)
    return total + wide * score_of(word)


@triton.jit
def _sum_tiles(
    grad_output, words, grad_scores, values, first_column, is_column,
    start, end, D,
    K: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, IS_BEGUN: tl.constexpr, HAS_PRODUCTS: tl.constexpr,
    IS_WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Sum narrow slices LOOKUPS at a time; while some are summed, what belongs to the next ones is on its way."""
    i = tl.arange(0, LOOKUPS)
    total = tl.zeros([LOOKUPS, COLUMNS], tl.float32)
    last = tl.maximum(end - 1, 0)
    word = _words_at(words, start + i, last)
    next_word = _words_at(words, start + LOOKUPS + i, last)
    grads, product = _parts_of(
        grad_output, grad_scores, word, first_column, is_column[None, :], D, K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET
    )
    for place in range(start, end, LOOKUPS):
        next_grads, next_product = _parts_of(
            grad_output, grad_scores, next_word, first_column, is_column[None, :], D,
            K, COLUMNS, IS_BEGUN, IS_WHOLE, OFFSET,
        )  # fmt: skip
        later_word = _words_at(words, place + 2 * LOOKUPS + i, last)
        is_lookup = place + i < end
        wide = as_fp32(grads)
        if HAS_PRODUCTS:
            found = product + tl.sum(wide * values[None, :], axis=1)
            tl.store(grad_scores + lookup_of(word), found, mask=is_lookup)
        total += wide * tl.where(is_lookup, score_of(word), 0.0)[:, None]
        word, grads, product, next_word = next_word, next_grads, next_product, later_word
    return tl.sum(total, axis=0)


@triton.jit
def _words_at(words, places, last):
    """Return the words at places up to `last`, or that one."""
    return tl.load(words + tl.minimum(places, last))

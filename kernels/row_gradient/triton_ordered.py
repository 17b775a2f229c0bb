"""What gradients take of lookups alone: it can be made while grad_output is still on its way."""

from typing import NamedTuple

from torch import Tensor

from mfdist.kernels.row_gradient.triton_order import Order, bounded, order_by_row, sort_list
from mfdist.kernels.row_gradient.triton_pieces import Pieces, pieces_of
from mfdist.kernels.row_id_check import can_be_bad, error_word
from mfdist.kernels.triton_launch import device_of


class Ordered(NamedTuple):
    """Lookups in order.

    Args:
        order: by row.
        pieces: how their runs are cut.
        grad_scores: [N, K], to be filled; a bad id's place is NaN already.
    """

    order: Order
    pieces: Pieces
    grad_scores: Tensor


def ordered_lookups(row_ids: Tensor, scores: Tensor, num_rows: int, code_stride: int, name: str) -> Ordered:
    """Return the lookups [N, K], of which there is one at least, in order; errors see `order_by_row`."""
    row_ids, scores = row_ids.contiguous(), scores.contiguous()
    limit = code_stride or num_rows
    grad_scores = scores.new_empty(scores.shape)
    word = error_word(name, limit, is_code=code_stride > 0)
    is_checked = can_be_bad(row_ids, limit)
    with device_of(scores):
        order = order_by_row(row_ids, scores, grad_scores, word, num_rows, code_stride, is_checked=is_checked)
        pieces = pieces_of(order, row_ids.shape[0], row_ids.shape[1], num_rows, row_ids, code_stride)
        return Ordered(order, pieces, grad_scores)


def order_list(row_ids: Tensor, scores: Tensor, numbers: Tensor, grad_scores: Tensor, num_rows: int) -> Ordered:
    """Return listed lookups, of which there is one at least, in order; see `sort_list`.

    Args:
        row_ids, scores, numbers, num_rows: see `sort_list`.
        grad_scores: [T, K], of which those of listed lookups are to be filled.
    """
    with device_of(scores):
        lookups = sort_list(row_ids, scores, numbers, num_rows)
        order = bounded(lookups, num_rows)
        num_tokens, num_lookups = grad_scores.shape
        pieces = pieces_of(order, num_tokens, num_lookups, num_rows, lookups.rows, None)
        return Ordered(order, pieces, grad_scores)

"""The row optimisers' update of touched rows: fused with the lookup's backward, or by gradients that are there."""

from mfdist.kernels.row_update.lookup import updating_gather_sum
from mfdist.kernels.row_update.op import fused_row_update, row_update, squared_sums
from mfdist.kernels.row_update.ragged import ragged_row_update
from mfdist.kernels.row_update.rule import RowRule

__all__ = [
    "RowRule",
    "fused_row_update",
    "ragged_row_update",
    "row_update",
    "squared_sums",
    "updating_gather_sum",
]

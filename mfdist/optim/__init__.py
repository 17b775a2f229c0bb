"""Row optimisers: how rows of tables are trained, a row at a time, in the backward pass or from gradients."""

from mfdist.optim.row_optimizer import STATE_DTYPES, RowAdagrad, RowAdam, RowOptimizer, RowSGD
from mfdist.optim.row_state import RowState

__all__ = ["STATE_DTYPES", "RowAdagrad", "RowAdam", "RowOptimizer", "RowSGD", "RowState"]

"""The lookup's gradients: of the rows, all of them or those that were read, and of the scores."""

from mfdist.kernels.row_gradient.marked import marked_row_gradient
from mfdist.kernels.row_gradient.op import row_gradient
from mfdist.kernels.row_gradient.ordered import order_lookups
from mfdist.kernels.row_gradient.sparse import sparse_row_gradient

__all__ = ["marked_row_gradient", "order_lookups", "row_gradient", "sparse_row_gradient"]

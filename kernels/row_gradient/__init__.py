"""The lookup's gradients: of the rows and of the scores."""

from mfdist.kernels.row_gradient.op import row_gradient

__all__ = ["row_gradient"]

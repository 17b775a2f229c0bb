"""The product of a matrix and one vector, for inference: a linear layer's for a single token."""

from mfdist.kernels.row_products.op import row_products

__all__ = ["row_products"]

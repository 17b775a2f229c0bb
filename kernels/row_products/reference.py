"""What row_products computes, in plain torch."""

from torch import Tensor


def row_products(rows: Tensor, x: Tensor) -> Tensor:
    """Return rows · x as [R]."""
    return rows @ x

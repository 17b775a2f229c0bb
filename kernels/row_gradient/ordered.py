"""What a gradient takes of its lookups alone, made before grad_output is there."""

from typing import TYPE_CHECKING

from torch import Tensor

from mfdist.kernels import implementation
from mfdist.kernels.lookup_arguments import check_lookup

if TYPE_CHECKING:
    from mfdist.kernels.row_gradient.triton_ordered import Ordered


def order_lookups(
    table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int = 0, name: str = "table"
) -> "Ordered | None":
    """Return what `marked_row_gradient` and `fused_row_update` can be given of a lookup, once; None: nothing.

    On a GPU lookups are put in the order of their rows before anything is summed, and so that can be done while
    grad_output is still on its way from other ranks. A CPU, and rows that are looked up seldom, have it done with the
    sums.

    Args:
        table: [R, D], as given to gather_sum; so are all others.
        row_ids: [N, K].
        scores: [N, K].
        code_stride: see gather_sum.
        name: what errors call the table.

    Raises:
        RowIdError: an id lies outside the table; when, see gather_sum.
        ConfigError: shapes, dtypes or devices do not fit together.

    Cost: N·K words of 8 bytes written, which stay until the gradient is there, and as many scores.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    if not (table.is_cuda and table.numel() and row_ids.numel()):
        return None
    made: Ordered | None = implementation.on_gpu("row_gradient").order_lookups(
        row_ids, scores, table.shape[0], code_stride, name
    )
    return made

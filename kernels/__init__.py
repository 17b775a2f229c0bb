"""The operations that touch tables: hashing activations to codes, the weighted lookup, and their gradients.

Each is a folder: `op` registers it with torch (dispatch, shapes for the compiler, autograd), `reference` says in plain
torch what it computes, `cpu_impl` (numba) and `triton_impl` compute it fast. The fast ones are imported, and compiled,
by the first call that needs them. Letters: N tokens, K lookups a token, R rows, D row width, S code stride.
"""

if __name__ != "mfdist.kernels":
    raise ImportError("this folder is imported as mfdist.kernels; `kernels` alone may be another project's package")

from mfdist.kernels.gather_sum import gather_sum
from mfdist.kernels.hashed_gather_sum import Norm, hashed_gather_sum
from mfdist.kernels.one_token_attention import MAX_HEAD_WIDTH, one_token_attention
from mfdist.kernels.quantize import QuantizedRows, quantize, quantized_gather_sum
from mfdist.kernels.ragged_gradient import ragged_gradient
from mfdist.kernels.row_gradient import marked_row_gradient, order_lookups, row_gradient, sparse_row_gradient
from mfdist.kernels.row_id_check import check_errors
from mfdist.kernels.row_products import row_products
from mfdist.kernels.row_update import (
    RowRule,
    fused_row_update,
    ragged_row_update,
    row_update,
    squared_sums,
    updating_gather_sum,
)
from mfdist.kernels.sign_hash import sign_hash

__all__ = [
    "MAX_HEAD_WIDTH",
    "Norm",
    "QuantizedRows",
    "RowRule",
    "check_errors",
    "fused_row_update",
    "gather_sum",
    "hashed_gather_sum",
    "marked_row_gradient",
    "one_token_attention",
    "order_lookups",
    "quantize",
    "quantized_gather_sum",
    "ragged_gradient",
    "ragged_row_update",
    "row_gradient",
    "row_products",
    "row_update",
    "sign_hash",
    "sparse_row_gradient",
    "squared_sums",
    "updating_gather_sum",
]

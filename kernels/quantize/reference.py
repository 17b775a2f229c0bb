"""What the lookup of quantised rows computes, in plain torch: slow, and obviously right."""

import torch
from torch import Tensor

from mfdist.kernels.gather_sum.reference import global_ids
from mfdist.kernels.quantize.rows import QuantizedRows


def quantized_gather_sum(rows: QuantizedRows, row_ids: Tensor, scores: Tensor, code_stride: int = 0) -> Tensor:
    """Return Σ_k scores[n, k] · row(n, k) as [N, D] in fp64; ids are taken to be in range."""
    ids = global_ids(row_ids, code_stride)
    weights = scores.double() * rows.scales[ids].double()
    # Indexed by bytes, because torch gathers no fp8 everywhere.
    values = rows.values.view(torch.uint8)[ids].view(rows.values.dtype).double()
    return (values * weights.unsqueeze(-1)).sum(dim=1)

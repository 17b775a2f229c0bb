"""What gather_sum computes, in plain torch: slow, in any floating dtype, and obviously right."""

import torch
from torch import Tensor


def gather_sum(table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int = 0) -> Tensor:
    """Return Σ_k scores[n, k] · table[row(n, k)] as [N, D] in table.dtype; ids are taken to be in range."""
    rows = table[global_ids(row_ids, code_stride)]
    wide = torch.promote_types(table.dtype, scores.dtype)
    return (rows.to(wide) * scores.to(wide).unsqueeze(-1)).sum(dim=1).to(table.dtype)


def global_ids(row_ids: Tensor, code_stride: int) -> Tensor:
    """Return int64 row ids: as given, or k · code_stride + code where a stride is given."""
    ids = row_ids.long()
    if code_stride:
        ids = ids + code_stride * torch.arange(ids.shape[1], device=ids.device)
    return ids

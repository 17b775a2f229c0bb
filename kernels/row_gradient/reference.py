"""What row_gradient computes, in plain torch: slow, in any floating dtype, and obviously right."""

import torch
from torch import Tensor


def row_gradient(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int = 0
) -> tuple[Tensor, Tensor]:
    """Return gather_sum's gradients, [R, D] in table.dtype and [N, K] in scores.dtype; ids are taken to be in range."""
    wide = torch.promote_types(table.dtype, scores.dtype)
    ids = row_ids.long()
    if code_stride:
        ids = ids + code_stride * torch.arange(ids.shape[1], device=ids.device)
    grad = grad_output.to(wide)
    weighted = scores.to(wide).unsqueeze(-1) * grad.unsqueeze(1)
    grad_table = torch.zeros(table.shape, dtype=wide, device=table.device)
    grad_table.index_add_(0, ids.reshape(-1), weighted.reshape(-1, table.shape[1]))
    grad_scores = (table[ids].to(wide) * grad.unsqueeze(1)).sum(dim=-1)
    return grad_table.to(table.dtype), grad_scores.to(scores.dtype)

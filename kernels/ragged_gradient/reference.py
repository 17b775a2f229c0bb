"""What ragged_gradient computes, in plain torch: slow, in any floating dtype, and obviously right."""

import torch
from torch import Tensor


def ragged_gradient(
    table: Tensor, row_ids: Tensor, tokens: Tensor, scores: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (unique rows [U], their gradients [U, D], the scores' gradients [M]); ids are taken to be in range."""
    wide = torch.promote_types(table.dtype, scores.dtype)
    rows, position = torch.unique(row_ids.long(), return_inverse=True)
    grad = grad_output.to(wide)[tokens.long()]
    grad_rows = torch.zeros(rows.numel(), table.shape[1], dtype=wide, device=table.device)
    grad_rows.index_add_(0, position, scores.to(wide).unsqueeze(-1) * grad)
    grad_scores = (table[row_ids.long()].to(wide) * grad).sum(dim=-1)
    return rows, grad_rows.to(table.dtype), grad_scores.to(scores.dtype)

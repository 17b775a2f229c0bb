"""Lookups listed one by one, and what the oracle says of their gradients."""

import numpy as np
import torch
from torch import Tensor

from mfdist.testing import oracles


def make_list(
    num_lookups: int, num_tokens: int, num_rows: int, row_dim: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return table, row_ids, tokens in ascending order, scores and grad_output."""
    return (
        torch.randn(num_rows, row_dim).to(dtype),
        torch.randint(0, num_rows, (num_lookups,), dtype=torch.int32),
        torch.randint(0, num_tokens, (num_lookups,), dtype=torch.int32).sort().values,
        torch.randn(num_lookups),
        torch.randn(num_tokens, row_dim).to(dtype),
    )


def expected_of_list(
    table: Tensor, row_ids: Tensor, tokens: Tensor, scores: Tensor, grad_output: Tensor
) -> tuple[oracles.Ints, oracles.Floats, oracles.Floats]:
    """Return rows, row gradients and score gradients of lookups, each taken as a token of its own."""
    ids, grads = row_ids.long().numpy()[:, None], grad_output.double().numpy()[tokens.numpy()]
    exact = (table.double().numpy(), ids, scores.double().numpy()[:, None], grads)
    grad_table, grad_scores = oracles.row_gradient(*exact)
    rows = np.unique(ids)
    return rows, grad_table[rows], grad_scores[:, 0]

"""Lookups listed one by one, or token by token, and what the oracle or the reference says of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfdist.kernels.row_update import RowRule
from mfdist.testing import oracles
from tests.kernels.lookups import Lookup
from tests.kernels.updates import Updated, reference_update


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


@dataclass(frozen=True)
class TokenList:
    """Arguments of ragged_row_update: lookups of tokens that have up to K of them."""

    table: Tensor
    row_ids: Tensor
    runs: Tensor
    scores: Tensor
    grad_output: Tensor
    num_lookups: int

    def reference_update(self, before: Updated, rule: RowRule, offsets: tuple[int, int]) -> tuple[Tensor, Updated]:
        """Return the reference's score gradients [M], table and state, every lookup taken as a token of its own."""
        grads = self.grad_output.repeat_interleave(self.runs.long(), dim=0)
        alone = Lookup(self.table, self.row_ids[:, None], self.scores[:, None], grads, 0)
        expected_scores, expected = reference_update(before, alone, rule, offsets)
        return expected_scores.view(-1), expected


def make_token_list(
    num_tokens: int,
    num_lookups: int,
    num_rows: int,
    row_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    id_dtype: torch.dtype = torch.int32,
) -> TokenList:
    """Return a list in which tokens have between none and all of K lookups."""
    runs = torch.randint(0, num_lookups + 1, (num_tokens,), dtype=torch.int32)
    num_ids = int(runs.sum())
    return TokenList(
        torch.randn(num_rows, row_dim).to(dtype),
        torch.randint(0, num_rows, (num_ids,), dtype=id_dtype),
        runs,
        torch.randn(num_ids),
        torch.randn(num_tokens, row_dim).to(dtype),
        num_lookups,
    )

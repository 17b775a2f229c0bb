"""Random lookups to test with, and the check of a whole lookup, forward and backward, against the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist.kernels import gather_sum, row_gradient
from mfdist.testing import oracles
from mfdist.testing.tolerances import TOLERANCES, relative_error

#: Runs of odd and even length, around the ends of pieces of 8 lookups, which runs of 16 and more are cut into.
RUNS_BY_EIGHT = (1, 2, 7, 15, 16, 17, 18, 24)


@dataclass(frozen=True)
class Lookup:
    """Arguments of gather_sum and a gradient of its output."""

    table: Tensor
    row_ids: Tensor
    scores: Tensor
    grad_output: Tensor
    code_stride: int


def make_lookup(
    num_tokens: int,
    num_lookups: int,
    rows_each: int,
    row_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    id_dtype: torch.dtype = torch.uint8,
    is_compact: bool = True,
) -> Lookup:
    """Return a lookup of codes (`is_compact`) in `num_lookups` tables, or of ids anywhere in all of them."""
    num_rows = max(1, num_lookups) * rows_each if not is_compact else num_lookups * rows_each
    limit = rows_each if is_compact else num_rows
    return Lookup(
        torch.randn(num_rows, row_dim).to(dtype),
        torch.randint(0, limit, (num_tokens, num_lookups)).to(id_dtype),
        torch.randn(num_tokens, num_lookups),
        torch.randn(num_tokens, row_dim).to(dtype),
        rows_each if is_compact else 0,
    )


def make_runs(counts: Sequence[int], num_rows: int, row_dim: int, *, dtype: torch.dtype = torch.float32) -> Lookup:
    """Return a lookup of two ids a token that reads a row as often as each of `counts`, whose sum is even."""
    lookup = make_lookup(
        sum(counts) // 2, 2, num_rows // 2, row_dim, dtype=dtype, is_compact=False, id_dtype=torch.int64
    )
    ids = torch.randperm(num_rows)[: len(counts)].repeat_interleave(torch.tensor(counts))
    lookup.row_ids.copy_(ids[torch.randperm(ids.numel())].view(-1, 2))
    return lookup


def assert_matches_oracle(lookup: Lookup) -> None:
    """Compare gather_sum, its autograd gradients and row_gradient with the float64 oracle."""
    table = lookup.table.clone().requires_grad_()
    scores = lookup.scores.clone().requires_grad_()
    out = gather_sum(table, lookup.row_ids, scores, lookup.code_stride)
    out.backward(lookup.grad_output)  # type: ignore[no-untyped-call]
    assert_is(out, expected_sum(lookup), table.dtype)
    grad_table, grad_scores = expected_gradients(lookup)
    assert_is(table.grad, grad_table, table.dtype)
    assert_is(scores.grad, grad_scores, torch.float32)
    direct = row_gradient(lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output, lookup.code_stride)
    assert table.grad is not None and torch.equal(direct[0], table.grad)
    assert scores.grad is not None and torch.equal(direct[1], scores.grad)


def assert_is(got: Tensor | None, expected: object, dtype: torch.dtype) -> None:
    """Compare one result in dtype and value."""
    assert got is not None and got.dtype == dtype
    error = relative_error(got.detach().double().cpu().numpy(), expected)  # type: ignore[arg-type]
    assert error <= TOLERANCES[str(dtype).removeprefix("torch.")], error


def expected_sum(lookup: Lookup) -> oracles.Floats:
    """Return the oracle's output."""
    return oracles.gather_sum(
        lookup.table.double().numpy(), lookup.row_ids.long().numpy(), lookup.scores.double().numpy(), lookup.code_stride
    )


def expected_gradients(lookup: Lookup) -> tuple[oracles.Floats, oracles.Floats]:
    """Return the oracle's gradients."""
    return oracles.row_gradient(
        lookup.table.double().numpy(),
        lookup.row_ids.long().numpy(),
        lookup.scores.double().numpy(),
        lookup.grad_output.double().numpy(),
        lookup.code_stride,
    )

"""What every `Table` must do, as a suite that a new implementation inherits.

    class TestLocalTable(TableConformance):
        def make_table(self, rows: Tensor) -> Table: ...

Results are compared with `mfdist.testing.oracles` in float64, within `mfdist.testing.tolerances`.
"""

from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor

from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels import check_errors
from mfdist.table import Table
from mfdist.testing import oracles
from mfdist.testing.tolerances import TOLERANCES, relative_error

#: What rows may be.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TableConformance(ABC):
    """The contract of `Table.forward`, one test a promise."""

    #: How many processes make each lookup, whose gradients are summed.
    num_ranks = 1

    @abstractmethod
    def make_table(self, rows: Tensor) -> Table:
        """Return a table that holds `rows` [R, D], in their dtype."""

    def rows_gradient(self, table: Table) -> Tensor:
        """Return the gradient [R, D] of the rows after a backward; override where `weight.grad` is not it."""
        gradient = table.get_parameter("weight").grad
        assert gradient is not None
        return gradient.to_dense() if gradient.is_sparse else gradient

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("num_tokens", "num_lookups", "row_dim"), [(1, 1, 1), (63, 3, 40), (100, 8, 33), (5, 1, 96)]
    )
    def test_forward_and_gradients(self, dtype: torch.dtype, num_tokens: int, num_lookups: int, row_dim: int) -> None:
        """The lookup and both gradients are the oracle's, for row ids anywhere in the table."""
        rows, scores = torch.randn(20, row_dim).to(dtype), torch.randn(num_tokens, num_lookups)
        self._check(rows, torch.randint(0, 20, (num_tokens, num_lookups)), scores, code_stride=0)

    @pytest.mark.parametrize("code_dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
    def test_codes_own_their_slots_rows(self, code_dtype: torch.dtype) -> None:
        """With a stride, the row of slot k is k·S + code."""
        rows, scores = torch.randn(5 * 16, 24), torch.randn(41, 5)
        self._check(rows, torch.randint(0, 16, (41, 5)).to(code_dtype), scores, code_stride=16)

    def test_repeated_ids_add_up(self) -> None:
        """All lookups of one row, which are no more with many ranks: the tolerance is for sums of so many terms."""
        num_tokens = min(50, 200 // self.num_ranks)
        self._check(torch.randn(4, 8), torch.full((num_tokens, 6), 3), torch.randn(num_tokens, 6), code_stride=0)

    @pytest.mark.parametrize("shape", [(0, 3), (7, 0), (0, 0)])
    def test_nothing_to_look_up(self, shape: tuple[int, int]) -> None:
        """No tokens give no rows; no lookups give zeros, and zero gradients."""
        table = self.make_table(torch.randn(4, 8))
        scores = torch.randn(shape, requires_grad=True)
        out = table(torch.zeros(shape, dtype=torch.int64), scores)
        assert out.shape == (shape[0], 8) and not out.any()
        out.sum().backward()
        assert scores.grad is not None and scores.grad.shape == shape and not self.rows_gradient(table).any()

    @pytest.mark.parametrize(("bad", "stride"), [(20, 0), (-1, 0), (2**40, 0), (4, 4), (-1, 4)])
    def test_an_id_outside_is_an_error_that_names_table_and_id(self, bad: int, stride: int) -> None:
        """Nothing is read for it, not even a neighbouring slot's row."""
        table = self.make_table(torch.randn(20, 8))
        ids = torch.zeros(9, 5, dtype=torch.int64)
        ids[7, 2] = bad
        with pytest.raises(RowIdError, match=rf"{bad}\b.*{table.spec.name}"):
            _looked_up(table, ids, torch.ones(9, 5), stride)

    def test_shapes_that_do_not_fit_are_an_error(self) -> None:
        """Ids and scores must be alike, and a stride must divide the table among the lookups."""
        table = self.make_table(torch.randn(20, 8))
        with pytest.raises(ConfigError):
            table(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 4))
        with pytest.raises(ConfigError):
            table(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), code_stride=7)

    def test_the_same_bits_every_time(self) -> None:
        """Forward and gradients do not depend on threads, timing or earlier calls."""
        rows, ids, scores = torch.randn(6, 64), torch.randint(0, 6, (500, 7)), torch.randn(500, 7)
        results = [self._run(rows, ids, scores, 0) for _ in range(3)]
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))

    def test_spec_and_repr_tell_the_size(self) -> None:
        """A reader of `print(model)` sees what the table is."""
        table = self.make_table(torch.randn(20, 8))
        assert (table.spec.num_rows, table.spec.row_dim, table.spec.dtype) == (20, 8, torch.float32)
        assert "num_rows=20, row_dim=8, dtype=float32" in repr(table)

    def _run(self, rows: Tensor, ids: Tensor, scores: Tensor, code_stride: int) -> tuple[Tensor, Tensor, Tensor]:
        table, scores = self.make_table(rows), scores.clone().requires_grad_()
        out: Tensor = table(ids, scores, code_stride=code_stride)
        out.backward(grad_output_of(out))  # type: ignore[no-untyped-call]
        assert scores.grad is not None
        return out.detach(), self.rows_gradient(table), scores.grad

    def _check(self, rows: Tensor, ids: Tensor, scores: Tensor, code_stride: int) -> None:
        out, grad_rows, grad_scores = self._run(rows, ids, scores, code_stride)
        assert out.dtype == rows.dtype
        exact = (floats(rows), ids.long().cpu().numpy(), floats(scores))
        wanted = oracles.gather_sum(*exact, code_stride)
        wanted_rows, wanted_scores = oracles.row_gradient(*exact, floats(grad_output_of(out)), code_stride)
        for got, want in ((out, wanted), (grad_rows, wanted_rows), (grad_scores, wanted_scores)):
            assert_close(got, want)


def _looked_up(table: Table, ids: Tensor, scores: Tensor, code_stride: int) -> None:
    """Look up, and wait for a GPU to report a bad id; by itself it would do so at one of the next calls."""
    table(ids, scores, code_stride=code_stride)
    check_errors()


def floats(tensor: Tensor) -> oracles.Floats:
    """Return a tensor of any device as the oracles take it."""
    return tensor.detach().double().cpu().numpy()


def assert_close(got: Tensor, want: oracles.Floats) -> None:
    """Compare a result with the oracle's within the tolerance of its dtype."""
    assert relative_error(floats(got), want) <= TOLERANCES[str(got.dtype).removeprefix("torch.")]


def grad_output_of(out: Tensor) -> Tensor:
    """Return a fixed gradient of the output that has no symmetry."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)

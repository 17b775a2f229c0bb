"""What every `Table` must do once `fuse` has made its backward train the rows: a suite beside `TableConformance`.

class TestLocalTable(TableConformance, FusedConformance):
    def make_table(self, rows: Tensor) -> Table: ...
"""

from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor

from mfdist.optim import RowAdagrad, RowAdam, RowOptimizer, RowSGD
from mfdist.table import Table
from mfdist.testing import oracles
from mfdist.testing.table_conformance import DTYPES, assert_close, floats, grad_output_of

_OPTIMIZERS = (
    RowSGD(lr=0.1, weight_decay=0.5),
    RowAdagrad(lr=0.1, weight_decay=0.5),
    RowAdagrad(lr=0.1, weight_decay=0.5, decay=0.5),
    RowAdam(lr=0.1, weight_decay=0.5, eps=1e-6),
)


class FusedConformance(ABC):
    """The contract of `Table.fuse`, one test a promise."""

    @abstractmethod
    def make_table(self, rows: Tensor) -> Table:
        """Return a table that holds `rows` [R, D], in their dtype."""

    @abstractmethod
    def rows_gradient(self, table: Table) -> Tensor:
        """Return the gradient [R, D] of the rows after a backward of a table that is not fused."""

    def rows_of(self, table: Table) -> Tensor:
        """Return a copy of all rows [R, D]; override where `weight` does not hold them."""
        return table.get_parameter("weight").detach().clone()

    def states_of(self, table: Table) -> list[Tensor]:
        """Return copies of the row optimiser's states, [R] or [R, D]; override where one process does not hold them."""
        assert table.row_state is not None
        return [tensor.clone() for tensor in table.row_state.tensors.values()]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("optimizer", _OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
    @pytest.mark.parametrize("code_stride", [0, 16])
    def test_a_fused_backward_is_one_update(
        self, optimizer: RowOptimizer, dtype: torch.dtype, code_stride: int
    ) -> None:
        """Twice: rows that were read take the oracle's step, others keep their bits; scores' gradients come first."""
        table = self.make_table(torch.randn(5 * 16, 33).to(dtype)).fuse(optimizer)
        rule = optimizer.rule
        for step in (1, 2):
            ids, scores = torch.randint(0, 16, (7, 5)), torch.randn(7, 5, requires_grad=True)
            before, states = self.rows_of(table), self.states_of(table)
            out: Tensor = table(ids, scores, code_stride=code_stride)
            assert torch.equal(self.rows_of(table), before)  # a lookup changes nothing
            out.backward(grad_output_of(out))  # type: ignore[no-untyped-call]
            exact = (floats(before), ids.cpu().numpy(), floats(scores))
            grads, grad_scores = oracles.row_gradient(*exact, floats(grad_output_of(out)), code_stride)
            assert scores.grad is not None
            assert_close(scores.grad, grad_scores)
            touched = torch.unique(ids + code_stride * torch.arange(5))
            wanted = oracles.row_update(
                floats(before[touched]),
                [floats(state[touched]) for state in states],
                grads[touched.cpu().numpy()],
                rule.kind,
                optimizer.lr,
                step,
                weight_decay=rule.weight_decay,
                eps=rule.eps,
                betas=rule.betas,
            )
            after = [self.rows_of(table), *self.states_of(table)]
            for got, want in zip(after, [wanted[0], *wanted[1]], strict=True):
                assert_close(got[touched], want)
            others = torch.ones(80, dtype=torch.bool).index_fill(0, touched, False)
            for got, old in zip(after, [before, *states], strict=True):
                assert torch.equal(got[others], old[others])

    def test_a_fused_table_needs_no_gradient_of_its_scores_and_keeps_none_of_its_own(self) -> None:
        """Ids known beforehand train the rows too; unfused again, rows get a gradient as before."""
        table = self.make_table(torch.randn(6, 8)).fuse(RowSGD(lr=0.5))
        before = self.rows_of(table)
        table(torch.tensor([[1, 4]]), torch.ones(1, 2)).sum().backward()
        after = self.rows_of(table)
        assert torch.equal(after[[1, 4]], before[[1, 4]] - 0.5) and torch.equal(after[[0, 2]], before[[0, 2]])
        assert all(parameter.grad is None for parameter in table.parameters())
        table.fuse(None)
        table(torch.tensor([[1, 4]]), torch.ones(1, 2)).sum().backward()
        assert torch.equal(self.rows_of(table), after) and self.rows_gradient(table)[1].tolist() == [1.0] * 8

    @pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "bytes"])
    def test_fused_updates_repeat_bit_for_bit_and_follow_the_rate(self, state_dtype: torch.dtype) -> None:
        """The same steps from the same rows end in the same bits, stochastic rounding included."""
        rows, ids = torch.randn(6, 64).bfloat16(), torch.randint(0, 6, (3, 500, 7))
        ends = []
        for rates in ((0.1, 0.01, 0.1), (0.1, 0.01, 0.1), (0.1, 0.1, 0.1)):
            table = self.make_table(rows).fuse(RowAdam(lr=0.3, state_dtype=state_dtype))
            assert table.row_state is not None
            for step, rate in enumerate(rates):
                table.row_state.lr = rate
                out = table(ids[step], torch.ones(500, 7))
                out.backward(grad_output_of(out))
            ends.append((self.rows_of(table), *self.states_of(table)))
            assert table.row_state.num_updates == 3
        assert all(torch.equal(one, two) for one, two in zip(ends[0], ends[1], strict=True))
        assert not torch.equal(ends[0][0], ends[2][0])

    def test_two_lookups_whose_backwards_are_both_to_come_are_refused_not_mixed_up(self) -> None:
        """The second backward would differentiate rows that are no longer those it read."""
        table = self.make_table(torch.randn(6, 8)).fuse(RowSGD(lr=0.5))
        scores = torch.ones(1, 2, requires_grad=True)
        both = table(torch.tensor([[1, 4]]), scores) + table(torch.tensor([[1, 2]]), scores)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            both.sum().backward()

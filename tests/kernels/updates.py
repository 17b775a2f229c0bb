"""Row updates to test with: states, and the check of an update against the reference in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist.kernels.row_update import RowRule, reference
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.kernels.lookups import Lookup

RULES = tuple(
    RowRule(kind=kind, weight_decay=0.1, eps=1e-6, betas=(0.9, 0.999), seed=7)
    for kind in ("sgd", "rowwise_adagrad", "adam")
)
#: Adagrad whose sums only grow; that of RULES forgets.
ADAGRAD = RowRule(kind="rowwise_adagrad", weight_decay=0.1, eps=1e-6, betas=(0.0, 1.0), seed=7)
LR, STEP = torch.tensor(0.05), torch.tensor(3)


@dataclass(frozen=True)
class Updated:
    """A table and its state, which an update changes."""

    table: Tensor
    state: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> "Updated":
        """Return a copy, in a dtype where one is given, but for states of bytes, which the reference has as such."""
        states = [each.clone() if each.dtype == torch.uint8 else each.to(dtype, copy=True) for each in self.state]
        return Updated(self.table.to(dtype, copy=True), states)


def make_updated(table: Tensor, rule: RowRule, state_dtype: torch.dtype = torch.float32) -> Updated:
    """Return a copy of a table with a random state."""
    state = {
        "sgd": list,
        # Some rows are updated for the first time.
        "rowwise_adagrad": lambda: [torch.rand(table.shape[0]) * (torch.arange(table.shape[0]) % 3 > 0)],
        "adam": lambda: _moments(torch.randn(table.shape), torch.rand(table.shape), state_dtype),
    }[rule.kind]()
    return Updated(table.clone(), state)


def _moments(momentum: Tensor, variance: Tensor, dtype: torch.dtype) -> list[Tensor]:
    rows = torch.arange(momentum.shape[0])
    values = enumerate((momentum, variance), start=1)
    return [reference.rounded(value, dtype, 0, 0, stream, rows, (0, 0)) for stream, value in values]


def reference_update(
    before: Updated, lookup: Lookup, rule: RowRule, offsets: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Updated]:
    """Return the reference's score gradients and a new table and state, in float64 but for states of bytes."""
    expected = before.copy(torch.float64)
    grad_scores = reference.fused_row_update(
        expected.table,
        expected.state,
        lookup.row_ids,
        lookup.scores.double(),
        lookup.grad_output,
        float(LR),
        int(STEP),
        rule,
        offsets,
        lookup.code_stride,
    )
    return grad_scores, expected


def assert_close(got: Updated, expected: Updated) -> None:
    """Compare table and state, each within the tolerance of its dtype; bytes are to be the same but for rare ties.

    A last bit of the fp32 value decides one rounding in a hundred thousand, and then between neighbours.
    """
    for one, other in zip([got.table, *got.state], [expected.table, *expected.state], strict=True):
        if one.dtype == torch.uint8:
            apart = (one.cpu().int() - other.int()).abs()
            assert int(apart.count_nonzero()) <= 1 + one.numel() // 1000 and (apart <= 1).all()
            continue
        error = relative_error(one.double().cpu().numpy(), other.numpy())
        bound = TOLERANCES[str(one.dtype).removeprefix("torch.")]
        assert error <= bound, (one.dtype, error)


def touched_rows(lookup: Lookup) -> Tensor:
    """Return the rows that are looked up, in rising order."""
    strides = lookup.code_stride * torch.arange(lookup.row_ids.shape[1])
    return (lookup.row_ids.long() + strides).unique()

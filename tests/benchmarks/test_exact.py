"""The benchmark's float64 results against the oracle, in parts as small as they get."""

import pytest
import torch
from torch import Tensor

from mfdist.benchmarks import exact
from mfdist.kernels import quantize
from mfdist.kernels.quantize import dequantize
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.kernels.lookups import expected_gradients, expected_sum, make_lookup


def check(parts: list[tuple[slice, Tensor]], expected: object) -> None:
    assert [part.start for part, _ in parts[1:]] == [part.stop for part, _ in parts[:-1]]
    got = torch.cat([values for _, values in parts])
    assert got.dtype == torch.float64
    assert relative_error(got.numpy(), expected) <= TOLERANCES["float64"]  # type: ignore[arg-type]


@pytest.mark.parametrize("part_values", [1, 1000, 1 << 23])
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
def test_all_three(is_compact: bool, part_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exact._PART_VALUES, "cpu", part_values)
    lookup = make_lookup(31, 5, 6, 7, is_compact=is_compact)
    table, ids, scores, grad, stride = (
        lookup.table,
        lookup.row_ids,
        lookup.scores,
        lookup.grad_output,
        lookup.code_stride,
    )
    check(list(exact.sums(table, ids, scores, stride)), expected_sum(lookup))
    grad_rows, grad_scores = expected_gradients(lookup)
    check(list(exact.row_gradients(len(table), ids, scores, grad, stride)), grad_rows)
    check(list(exact.score_gradients(table, ids, grad, stride)), grad_scores)


def test_sums_of_quantised_rows() -> None:
    lookup = make_lookup(31, 5, 6, 7)
    for kind in (torch.int8, torch.float8_e4m3fn):
        rows = quantize(lookup.table, kind)
        got = list(exact.sums(rows.values, lookup.row_ids, lookup.scores, 6, rows.scales))
        wide = dequantize(rows, torch.float64)
        check(got, next(exact.sums(wide, lookup.row_ids, lookup.scores, 6))[1].numpy())

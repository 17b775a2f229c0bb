"""Runs the row updates' Triton kernels in Triton's interpreter against the reference; test_row_update starts it.

See interpreted_triton for what the interpreter is like. It truncates where a GPU rounds to the nearest, but stochastic
rounding is integer arithmetic: bf16 rows and states must have the very bits of the reference.
"""

import sys

import torch
import triton.language as tl
from torch import Tensor

from mfdist.errors import RowIdError
from mfdist.kernels import check_errors
from mfdist.kernels.row_gradient import triton_order as ordering
from mfdist.kernels.row_gradient import triton_pieces as pieces
from mfdist.kernels.row_gradient import triton_slices as slicing
from mfdist.kernels.row_gradient import triton_sums as summing
from mfdist.kernels.row_gradient.triton_ordered import ordered_lookups
from mfdist.kernels.row_update import RowRule, reference, triton_impl, triton_windows
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.kernels.lookups import RUNS_BY_EIGHT, Lookup, make_lookup, make_runs
from tests.kernels.ragged_lookups import TokenList, make_token_list
from tests.kernels.row_moments import assert_rounds_as_the_reference
from tests.kernels.updates import ADAGRAD, LR, RULES, STEP, assert_close, make_updated, reference_update, touched_rows


def check(lookup: Lookup, rule: RowRule, state_dtype: torch.dtype = torch.float32) -> None:
    """Compare the fused update, and a repetition with lookups that were put in order before, with the reference."""
    offsets = (1 << 40, 3)
    before = make_updated(lookup.table, rule, state_dtype)
    results = []
    for is_repeated in (False, True):
        got, ordered = before.copy(), None
        num_ids, num_rows = lookup.row_ids.numel(), lookup.table.shape[0]
        if is_repeated and num_ids and not slicing.is_seldom(num_ids, num_rows):
            ordered = ordered_lookups(lookup.row_ids, lookup.scores, num_rows, lookup.code_stride, "t")
        grad_scores = triton_impl.fused_row_update(
            got.table, got.state, lookup.row_ids, lookup.scores, lookup.grad_output,
            LR, STEP, rule, offsets, lookup.code_stride, "t", ordered,
        )  # fmt: skip
        results.append((grad_scores, got.table, *got.state))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    expected_scores, expected = reference_update(before, lookup, rule, offsets)
    assert relative_error(grad_scores.numpy(), expected_scores.numpy()) <= TOLERANCES["float32"]
    assert_close(got, expected)


def check_given(lookup: Lookup, rule: RowRule, state_dtype: torch.dtype = torch.float32) -> None:
    """Compare the update from gradients that are there with the reference."""
    offsets = (1 << 40, 3)
    rows = touched_rows(lookup)
    dense = torch.randn(lookup.table.shape)
    before = make_updated(lookup.table, rule, state_dtype)
    squares = torch.rand(rows.numel())
    for grads, chosen, mean_squares in (
        (dense, None, None),
        (dense, rows, None),
        (dense[rows], rows.int(), squares),
        (dense, None, torch.where(torch.rand(dense.shape[0]) < 0.5, torch.inf, 0.5)),  # rows to be left as they are
    ):
        got, expected = before.copy(), before.copy(torch.float64)
        triton_impl.row_update(got.table, got.state, grads, chosen, mean_squares, LR, STEP, rule, offsets, "t")
        reference.row_update(
            expected.table, expected.state, grads, chosen, mean_squares, float(LR), int(STEP), rule, offsets
        )
        assert_close(got, expected)


def updates() -> None:
    for rule in RULES:
        check(make_lookup(63, 2, 6, 40), rule)
        check(make_lookup(30, 2, 6, 96, dtype=torch.bfloat16, id_dtype=torch.int32), rule, torch.bfloat16)
        check(make_lookup(9, 2, 30, 1, dtype=torch.float16, is_compact=False, id_dtype=torch.int64), rule)
        check_given(make_lookup(10, 2, 6, 40, dtype=torch.bfloat16), rule, torch.bfloat16)
    check(make_lookup(20, 2, 6, 33), ADAGRAD)
    check_given(make_lookup(10, 2, 6, 33), RULES[1])
    sgd, adagrad, _ = RULES
    check(make_lookup(0, 3, 8, 8), sgd)
    check(make_lookup(3, 20, 1, 100), adagrad)
    check(make_lookup(6, 2, 2, 640, dtype=torch.bfloat16), adagrad)  # slices of two widths
    equal = make_lookup(63, 2, 4, 20, id_dtype=torch.int32)
    equal.row_ids.fill_(3)
    slicing._COLUMNS_EACH = 16
    for rule in RULES:
        check(make_lookup(20, 2, 4, 40), rule)
    # Long runs, wide rows and few columns a warp, at small sizes.
    pieces._LENGTH, slicing._MOST_COLUMNS = 8, 16
    check(equal, adagrad)
    check(make_lookup(36, 2, 2, 40, is_compact=False), adagrad)
    check(make_lookup(36, 2, 2, 40, dtype=torch.bfloat16), adagrad)
    triton_impl._MOST_KEPT_BYTES = 0  # as for rows so many that slices are summed twice
    check(make_lookup(36, 2, 2, 40, is_compact=False), adagrad)
    ordering._MAX_COUNTED = 1  # as for codes too many to count
    check(make_lookup(36, 2, 2, 40), sgd)
    # Slices of 16, 32 and 32 columns, the wide ones two lookups at a time.
    slicing._MOST_COLUMNS = slicing._COLUMNS_EACH = 32
    summing._ELEMENTS = tl.constexpr(32)
    check(make_runs(RUNS_BY_EIGHT, 10, 80, dtype=torch.bfloat16), adagrad)
    triton_impl._MOST_KEPT_BYTES, triton_impl._KEPT_COLUMNS = 1 << 20, 32  # of the 48 that are kept
    for rule in RULES:
        check(make_runs(RUNS_BY_EIGHT, 10, 80), rule)
    # As of many tokens, whose pieces go in their order.
    slicing._CACHED_BYTES, slicing._SPAN_BYTES, slicing._LONG_RUN = 1, 128, 1
    pieces._LENGTH_BY_TOKEN, pieces._GROUP = 8, 8
    for rule in RULES:
        check(make_runs(RUNS_BY_EIGHT, 10, 80), rule)
        check(make_lookup(90, 2, 3, 40, dtype=torch.bfloat16), rule)


def windows() -> None:
    """Rows that are looked up seldom, on average; among them may be some that are not."""
    sgd, adagrad, adam = RULES
    triton_windows._WINDOW = 8
    for rule in RULES:
        check(make_lookup(20, 2, 80, 40), rule)
        check(make_lookup(7, 3, 100, 24, dtype=torch.bfloat16, is_compact=False, id_dtype=torch.int32), rule)
    check(make_lookup(1, 1, 2, 1), adagrad)
    check(make_lookup(20, 2, 80, 8, id_dtype=torch.uint16), sgd)
    check(make_lookup(20, 2, 256, 8), sgd)  # codes that cannot be bad
    # As many slices as there are steps in going over them.
    triton_windows._COLUMNS = triton_windows._WHOLE_COLUMNS = 16
    for rule in RULES:
        check(make_lookup(20, 2, 80, 40), rule)
    check(make_lookup(20, 2, 40, 24, dtype=torch.bfloat16), adagrad, torch.bfloat16)
    triton_windows.PIECE = 8
    for counts in ([80], [1, 16, 15, 33, 14, 1], [7, 40, 1, 1, 31], [17] * 4, [1] * 20 + [60]):
        lookup = make_runs(counts, 80, 20)
        for rule in (sgd, adagrad) if len(counts) > 1 else (adam,):
            check(lookup, rule)
    # Slices of 16, 32 and 32 columns, or of 16 and 32; long runs take the wide ones two lookups at a time.
    triton_windows._COLUMNS = triton_windows._WHOLE_COLUMNS = 32
    summing._ELEMENTS = tl.constexpr(32)
    for rule in RULES:
        check(make_runs([1, 16, 15, 35, 12, 1], 80, 80), rule)
    check(make_runs([1, 2, 27, 18], 80, 48, dtype=torch.bfloat16), adagrad)


def lists() -> None:
    """Lookups listed token by token, of which tokens have up to K."""
    sgd, adagrad, adam = RULES
    for rule in RULES:
        check_list(make_token_list(30, 5, 12, 40), rule)
        check_list(make_token_list(9, 3, 90, 24, dtype=torch.bfloat16, id_dtype=torch.int64), rule)
    check_list(make_token_list(0, 3, 8, 8), sgd)
    check_list(make_token_list(20, 1, 1, 1), adam)
    pieces._LENGTH, slicing._COLUMNS_EACH, slicing._MOST_COLUMNS = 8, 16, 16
    for rule in RULES:
        check_list(make_token_list(60, 4, 5, 40), rule)
    # As of many tokens, whose pieces go in their order.
    slicing._CACHED_BYTES, slicing._SPAN_BYTES, slicing._LONG_RUN = 1, 128, 1
    pieces._LENGTH_BY_TOKEN, pieces._GROUP = 8, 8
    check_list(make_token_list(90, 3, 5, 40, dtype=torch.bfloat16), adagrad)
    check_list(make_token_list(90, 3, 5, 40), sgd)
    # Long runs among rows that are looked up seldom.
    triton_windows.PIECE = triton_windows._WINDOW = 8
    for rule in RULES:
        listed = make_token_list(40, 3, 300, 40)
        listed.row_ids[torch.rand(listed.row_ids.shape) < 0.6] = 7
        assert (listed.row_ids == 7).sum() > 3 * triton_windows.PIECE
        check_list(listed, rule)


def check_list(listed: TokenList, rule: RowRule) -> None:
    """Compare the update by a list, and a repetition, with the reference."""
    offsets = (1 << 40, 3)
    before = make_updated(listed.table, rule)
    results = []
    for _ in range(2):
        got = before.copy()
        grad_scores = triton_impl.ragged_row_update(
            got.table, got.state, listed.row_ids, listed.runs, listed.scores, listed.grad_output, listed.num_lookups,
            LR, STEP, rule, offsets,
        )  # fmt: skip
        results.append((grad_scores, got.table, *got.state))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    expected_scores, expected = listed.reference_update(before, rule, offsets)
    assert relative_error(grad_scores.numpy(), expected_scores.numpy()) <= TOLERANCES["float32"]
    assert_close(got, expected)


def rounding() -> None:
    """fp32 values that every implementation has exactly are rounded to the reference's bits."""
    table = torch.zeros(5, 300, dtype=torch.bfloat16)
    values = torch.randn(5, 300)
    values[:, :3] = torch.tensor([3.4e38, 1e-40, 0.0])
    rule, step, offsets = RowRule(kind="sgd", seed=2**62 + 3), torch.tensor(2**33 + 1), (2**45, 2**20 + 1)
    squares = torch.zeros(5)  # those of the largest values would not be finite
    triton_impl.row_update(table, [], -values, None, squares, torch.tensor(1.0), step, rule, offsets, "t")
    expected = reference.rounded(values, torch.bfloat16, rule.seed, int(step), 0, torch.arange(5), offsets)
    assert torch.equal(table.view(torch.int16), expected.view(torch.int16))


def moments() -> None:
    """States of a byte each: updates by every kernel, and values that all have exactly to the reference's bytes."""
    adam = RULES[2]
    check(make_lookup(63, 2, 6, 40), adam, torch.uint8)
    check(make_lookup(30, 2, 6, 96, dtype=torch.bfloat16, id_dtype=torch.int32), adam, torch.uint8)
    check_given(make_lookup(10, 2, 6, 40, dtype=torch.bfloat16), adam, torch.uint8)
    triton_windows._WINDOW = 8
    check(make_lookup(20, 2, 80, 40, dtype=torch.bfloat16), adam, torch.uint8)

    def update(grads: Tensor, rule: RowRule, step: int, offsets: tuple[int, int]) -> list[Tensor]:
        table, lr, squares = torch.zeros(grads.shape), torch.tensor(0.0), torch.zeros(grads.shape[0])
        state = [torch.zeros(grads.shape, dtype=torch.uint8) for _ in range(2)]
        triton_impl.row_update(table, state, grads, None, squares, lr, torch.tensor(step), rule, offsets, "t")
        return state

    assert_rounds_as_the_reference(update)


def bad_ids() -> None:
    """A bad id changes no row, gives its score NaN, and is told of at the next call; so is a bad row."""
    for num_rows in (12, 300):  # with a program for every row, and for windows of lookups
        for bad in (num_rows, -1):
            ids = torch.zeros(40, 2, dtype=torch.int64)
            ids[1, 1] = bad
            table, ones = torch.zeros(num_rows, 8), torch.ones(40, 2)
            grad_scores = triton_impl.fused_row_update(
                table, [], ids, ones, torch.ones(40, 8), torch.tensor(1.0), STEP, RULES[0], (0, 0), 0, "t"
            )
            assert grad_scores.isnan().nonzero().tolist() == [[1, 1]]
            assert table[0].tolist() == [-79.0] * 8 and not table[1:].any()
            expect_error(f'row id {bad} is outside table "t" (num_rows={num_rows})')
            rows = torch.tensor([1, bad])
            triton_impl.row_update(
                table, [], torch.ones(2, 8), rows, None, torch.tensor(1.0), STEP, RULES[0], (0, 0), "t"
            )
            assert table[1].tolist() == [-1.0] * 8 and not table[2:].any()
            expect_error(f'row id {bad} is outside table "t" (num_rows={num_rows})')
    all_bad = torch.full((20, 2), 300)
    table = torch.ones(300, 8)
    triton_impl.fused_row_update(
        table, [], all_bad, torch.ones(20, 2), torch.ones(20, 8), torch.tensor(1.0), STEP, RULES[0], (0, 0), 0, "t"
    )
    assert torch.equal(table, torch.ones(300, 8))
    expect_error("row id 300 is outside")


def not_finite() -> None:
    """A row whose gradient is not finite stays as it is."""
    for rule in RULES:
        grads = torch.ones(4, 8)
        grads[1, 3], grads[2, 0] = torch.nan, -torch.inf
        got = make_updated(torch.randn(4, 8), rule)
        before = got.copy()
        triton_impl.row_update(got.table, got.state, grads, None, None, LR, STEP, rule, (0, 0), "t")
        for one, other in zip([got.table, *got.state], [before.table, *before.state], strict=True):
            assert torch.equal(one[1:3], other[1:3]) and not torch.equal(one[0], other[0])
    special = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], dtype=torch.bfloat16)
    rows = torch.cat([special, special.view(torch.int16).bitwise_or(0x7F).view(torch.bfloat16)])
    triton_impl.row_update(rows, [], torch.ones(2, 4), None, None, LR, STEP, RULES[0], (0, 0), "t")
    assert torch.equal(rows[0, 1:3], special[0, 1:3]) and rows[0, 3] < 1
    assert rows.isnan().tolist() == [[True, False, False, False], [True, True, True, False]]


def expect_error(start: str) -> None:
    try:
        check_errors()
    except RowIdError as error:
        assert str(error).startswith(start), error
    else:
        raise AssertionError("check_errors must raise")


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = (updates, windows, lists, rounding, moments, bad_ids, not_finite)
    {part.__name__: part for part in parts}[sys.argv[1]]()

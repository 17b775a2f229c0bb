"""row_update against the float64 reference: on the CPU, in Triton's interpreter, and as torch operators."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels.row_gradient import cpu_impl as gradient_on_cpu
from mfdist.kernels.row_gradient import order_lookups
from mfdist.kernels.row_update import RowRule, cpu_impl, fused_row_update, reference, row_update, squared_sums
from mfdist.kernels.row_update.arguments import rule_arguments
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.kernels.conftest import Interpret
from tests.kernels.lookups import Lookup, make_lookup
from tests.kernels.updates import LR, RULES, STEP, Updated, assert_close, make_updated, reference_update, touched_rows

INTERPRETED = "interpreted_row_update"
OFFSETS = (1 << 40, 3)
SGD, ADAGRAD, ADAM = RULES
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)


def update(got: Updated, lookup: Lookup, rule: RowRule, offsets: tuple[int, int] = OFFSETS) -> Tensor:
    return fused_row_update(
        got.table, got.state, lookup.row_ids, lookup.scores, lookup.grad_output, rule, LR, STEP,
        row_offset=offsets[0], column_offset=offsets[1], code_stride=lookup.code_stride, name="t",
    )  # fmt: skip


def check(lookup: Lookup, rule: RowRule, state_dtype: torch.dtype = torch.float32) -> Updated:
    before = make_updated(lookup.table, rule, state_dtype)
    got = before.copy()
    grad_scores = update(got, lookup, rule)
    expected_scores, expected = reference_update(before, lookup, rule, OFFSETS)
    assert relative_error(grad_scores.numpy(), expected_scores.numpy()) <= TOLERANCES["float32"]
    assert_close(got, expected)
    untouched = torch.ones(lookup.table.shape[0], dtype=torch.bool)
    untouched[touched_rows(lookup)] = False
    for one, other in zip([got.table, *got.state], [before.table, *before.state], strict=True):
        assert torch.equal(one[untouched], other[untouched])
    return got


@every_rule
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("row_dim", [1, 40, 300])
def test_sizes(num_tokens: int, row_dim: int, is_compact: bool, rule: RowRule) -> None:
    check(make_lookup(num_tokens, 5, 16, row_dim, is_compact=is_compact), rule)


@every_rule
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows(dtype: torch.dtype, is_compact: bool, rule: RowRule) -> None:
    state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    check(make_lookup(63, 4, 32, 100, dtype=dtype, is_compact=is_compact), rule, state_dtype)


def test_repeats_and_wide_rows() -> None:
    check(make_lookup(20, 1, 7, 12288), ADAGRAD)
    equal = make_lookup(500, 3, 16, 40)
    equal.row_ids.fill_(15)
    check(equal, ADAGRAD)
    check(make_lookup(9, 0, 7, 8, is_compact=False), SGD)


@every_rule
def test_both_ways_and_any_number_of_threads_give_the_same_bits(rule: RowRule, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = make_lookup(200, 4, 40, 100, dtype=torch.bfloat16)
    before = make_updated(lookup.table, rule, torch.bfloat16)
    monkeypatch.setattr(cpu_impl, "_PARALLEL_WORK", 0)
    results = []
    threads = torch.get_num_threads()
    try:
        for num_threads, most in ((1, 4096), (2, 4096), (1, 0), (2, 0)):
            torch.set_num_threads(num_threads)
            monkeypatch.setattr(gradient_on_cpu, "_MAX_OWN_ROWS", most)
            got = before.copy()
            update(got, lookup, rule)
            results.append((got.table, *got.state))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@every_rule
def test_a_gradient_that_is_there_gives_what_the_fused_update_gives(rule: RowRule) -> None:
    """Dense or by rows, of all columns or of parts of them, the parts with the whole row's squares."""
    lookup = make_lookup(50, 3, 20, 100, dtype=torch.bfloat16)
    before = make_updated(lookup.table, rule, torch.bfloat16)
    whole = before.copy()
    update(whole, lookup, rule)
    grads = torch.zeros(lookup.table.shape, dtype=torch.float64)
    gradient = (lookup.scores.double().unsqueeze(-1) * lookup.grad_output.double().unsqueeze(1)).flatten(0, 1)
    grads.index_add_(0, (lookup.row_ids.long() + 20 * torch.arange(3)).flatten(), gradient)
    rows, dense = touched_rows(lookup), grads.float()
    squares = squared_sums(dense[rows][:, :33]) + squared_sums(dense[rows][:, 33:])
    for given, chosen in ((dense, rows), (dense[rows], rows.int())):
        got = before.copy()
        row_update(
            got.table, got.state, given, rule, LR, STEP, rows=chosen, row_offset=OFFSETS[0], column_offset=OFFSETS[1]
        )
        assert_close(got, Updated(whole.table.double(), [each.double() for each in whole.state]))
    for columns in (slice(0, 33), slice(33, 100)):
        part = Updated(
            before.table[:, columns].contiguous(),
            [(each[:, columns] if each.ndim > 1 else each).clone(memory_format=torch.contiguous_format)
             for each in before.state],
        )  # fmt: skip
        row_update(
            part.table, part.state, dense[rows][:, columns], rule, LR, STEP, rows=rows, mean_squares=squares / 100,
            row_offset=OFFSETS[0], column_offset=OFFSETS[1] + columns.start,
        )  # fmt: skip
        expected = [(each[:, columns] if each.ndim > 1 else each).double() for each in (whole.table, *whole.state)]
        assert_close(part, Updated(expected[0], expected[1:]))


@every_rule
def test_a_part_of_the_rows_is_rounded_as_in_the_whole_table(rule: RowRule) -> None:
    table, grads = torch.randn(40, 30).bfloat16(), torch.randn(40, 30)
    whole = make_updated(table, rule, torch.bfloat16)
    part = Updated(whole.table[25:].clone(), [each[25:].clone() for each in whole.state])
    row_update(whole.table, whole.state, grads, rule, LR, STEP)
    row_update(part.table, part.state, grads[25:], rule, LR, STEP, row_offset=25)
    for one, other in zip([whole.table, *whole.state], [part.table, *part.state], strict=True):
        assert torch.equal(one[25:], other)


def test_rounding_has_the_references_bits() -> None:
    """fp32 values that every implementation has exactly; `interpreted_row_update` holds Triton to the same."""
    table, values = torch.zeros(5, 300, dtype=torch.bfloat16), torch.randn(5, 300)
    values[:, :3] = torch.tensor([3.4e38, 1e-40, 0.0])
    rule, step = RowRule(kind="sgd", seed=2**62 + 3), torch.tensor(2**33 + 1)
    row_update(
        table, [], -values, rule, torch.tensor(1.0), step,
        mean_squares=torch.zeros(5), row_offset=2**45, column_offset=2**20 + 1,
    )  # fmt: skip
    expected = reference.rounded(values, torch.bfloat16, rule.seed, int(step), 0, torch.arange(5), (2**45, 2**20 + 1))
    assert torch.equal(table.view(torch.int16), expected.view(torch.int16))


def test_rounding_is_right_on_average() -> None:
    """Over many rows, columns and steps the mean is the value, within five standard deviations of it."""
    rule, values = RowRule(kind="sgd", seed=11), torch.tensor([1.0 + 2.0**-9, -3.0 - 2.0**-11, 1e-3, 77.77])
    num_rows, num_columns, num_steps = 128, 64, 8
    for value in values:
        exact = float(value)
        total = squares = 0.0
        for step in range(1, num_steps + 1):
            table = torch.zeros(num_rows, num_columns, dtype=torch.bfloat16)
            grads = (-value).expand(num_rows, num_columns)
            row_update(table, [], grads, rule, torch.tensor(1.0), torch.tensor(step))
            errors = table.double() - exact
            total, squares = total + float(errors.sum()), squares + float(errors.square().sum())
            assert len(table.unique()) == 2
        count = num_rows * num_columns * num_steps
        assert abs(total / count) <= 5 * math.sqrt(squares / count / count)


def test_random_bits_are_spread_evenly_and_neighbours_do_not_agree() -> None:
    """Chi-squared over 256 bins, and correlations along rows, columns and streams."""
    bits = torch.stack(
        [reference.random_bits(3, step, stream, torch.arange(64), 256, 0) for step in (1, 2) for stream in (0, 1)]
    ).double()
    counts = torch.histc(bits, 256, 0, 65536)
    expected = bits.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 256 + 6 * math.sqrt(2 * 256)
    centred = (bits - bits.mean()) / bits.std()
    for dim in range(3):
        moved = centred.roll(1, dim)
        assert abs(float((centred * moved).mean())) < 6 / math.sqrt(bits.numel())


def test_small_updates_count_on_average() -> None:
    """An update of a sixteenth of the rounding's step is lost to the nearest, and arrives by chance."""
    table = torch.ones(64, 64, dtype=torch.bfloat16)
    for step in range(1, 65):
        row_update(
            table, [], torch.full((64, 64), 2.0**-12), RowRule(kind="sgd"), torch.tensor(1.0), torch.tensor(step)
        )
    assert float(table.double().mean()) == pytest.approx(1 - 64 * 2.0**-12, abs=1e-3)


@every_rule
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
def test_a_row_whose_gradient_is_not_finite_stays(rule: RowRule, is_compact: bool) -> None:
    lookup = make_lookup(30, 2, 8, 40, is_compact=is_compact)
    lookup.row_ids.copy_(torch.arange(60).view(30, 2) % 8)
    lookup.grad_output[3, 7], lookup.grad_output[4, 0] = torch.nan, torch.inf
    before = make_updated(lookup.table, rule)
    got = before.copy()
    update(got, lookup, rule)
    bad = (lookup.row_ids[3:5].long() + lookup.code_stride * torch.arange(2)).flatten()
    good = torch.tensor([row for row in touched_rows(lookup).tolist() if row not in bad.tolist()])
    for one, other in zip([got.table, *got.state], [before.table, *before.state], strict=True):
        assert torch.equal(one[bad], other[bad])
        assert bool((one[good] != other[good]).any()) and bool(one[good].isfinite().all())


def test_ids_and_rows_outside_change_nothing() -> None:
    for bad in (12, -1):
        table = torch.zeros(12, 4)
        lookup = Lookup(table, torch.tensor([[0, 1], [2, bad]]), torch.ones(2, 2), torch.ones(2, 4), 0)
        with pytest.raises(RowIdError, match=rf'row id {bad} at lookup 1 is outside table "t" \(num_rows=12\)'):
            update(Updated(table, []), lookup, SGD)
        with pytest.raises(RowIdError, match=rf'row id {bad} .*table "rows"'):
            row_update(table, [], torch.ones(2, 4), SGD, LR, STEP, rows=torch.tensor([0, bad]), name="rows")
        assert not table.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(4, 6)[:, ::2]}, "must be contiguous"),
        ({"state": []}, r"keeps 1 states of shape \[6\]"),
        ({"state": [torch.zeros(6, dtype=torch.bfloat16)]}, "make them anew"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, "lr must be one torch.float32 number"),
        ({"step": torch.tensor([1, 2])}, "step must be one torch.int64 number"),
        ({"grads": torch.zeros(3, 3)}, r"\[U, D\] = \[2, 3\], or have all 6 rows"),
        ({"rows": torch.tensor([[1, 2]])}, r"must be \[U\] in int32 or int64"),
        ({"rows": torch.tensor([2, 1])}, "must rise, each given once; got 1 after 2"),
        ({"rows": torch.tensor([2, 2])}, "add up the gradients of equal ones"),
        ({"mean_squares": torch.zeros(3)}, r"mean_squares must be \[U\] = \[2\]"),
        ({"grads": torch.zeros(2, 3, device="meta")}, "on the table's device"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    right = {
        "table": torch.zeros(6, 3),
        "state": [torch.zeros(6)],
        "grads": torch.ones(2, 3),
        "rule": ADAGRAD,
        "lr": LR,
        "step": STEP,
        "rows": torch.tensor([1, 4]),
        "mean_squares": torch.zeros(2),
    }
    row_update(**right)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        row_update(**{**right, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lion"}, "must be one of sgd, rowwise_adagrad, adam"),
        ({"kind": "adam", "betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
        ({"kind": "sgd", "weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"kind": "sgd", "seed": -1}, "seed of stochastic rounding"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowRule(**settings)  # type: ignore[arg-type]


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_accepts_the_operators(rule: RowRule, dtype: torch.dtype) -> None:
    lookup = make_lookup(9, 3, 8, 5, dtype=dtype)
    got = make_updated(lookup.table, rule)
    got = got.copy(torch.float64) if dtype == torch.float64 else got
    settings = (LR, STEP, *rule_arguments(rule), 0, 0)
    arguments = (got.table, got.state, lookup.row_ids, lookup.scores, lookup.grad_output, *settings, 8, "t")
    opcheck(torch.ops.mfdist.fused_row_update.default, arguments)
    opcheck(torch.ops.mfdist.row_update.default, (got.table, got.state, lookup.table, None, None, *settings, "t"))
    # Without backward, which changes inputs: tests/tables/test_local.py compiles that.
    anchor, scores = torch.zeros((), requires_grad=True), lookup.scores.requires_grad_()
    arguments = (got.table, got.state, lookup.row_ids, scores, LR, STEP, anchor, *settings[2:], 8, "t")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.mfdist.updating_gather_sum.default, arguments, test_utils=checks)


def test_a_change_in_place_is_known_to_autograd() -> None:
    table = torch.randn(4, 3)
    doubled = table.clone().requires_grad_() * table
    row_update(table, [], torch.ones(4, 3), SGD, LR, STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        doubled.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.large
def test_a_table_past_two_to_the_31_elements() -> None:
    """Virtual memory alone: 4.6 GB of bf16 and 9.2 of states, of which only a few rows are touched."""
    num_rows, row_dim = (1 << 21) + 5, 1100
    table = torch.empty(num_rows, row_dim, dtype=torch.bfloat16)
    state = [torch.empty_like(table), torch.empty_like(table)]
    ids = torch.tensor([[0, num_rows - 1], [num_rows - 1, num_rows // 2]])
    rows = torch.unique(ids)
    small = make_updated(torch.randn(3, row_dim).bfloat16(), ADAM, torch.bfloat16)
    for one, other in zip([table, *state], [small.table, *small.state], strict=True):
        one[rows] = other
    lookup = Lookup(table, ids, torch.randn(2, 2), torch.randn(2, row_dim).bfloat16(), 0)
    near = Lookup(small.table, torch.searchsorted(rows, ids), lookup.scores, lookup.grad_output, 0)
    _, expected = reference_update(small, near, ADAM)
    update(Updated(table, state), lookup, ADAM, (0, 0))
    assert_close(Updated(table[rows], [each[rows] for each in state]), expected)
    expected = Updated(table[rows], [each[rows] for each in state]).copy(torch.float64)
    grads = torch.randn(3, row_dim)
    reference.row_update(expected.table, expected.state, grads, None, None, float(LR), int(STEP), ADAM)
    row_update(table, state, grads, ADAM, LR, STEP, rows=rows)
    assert_close(Updated(table[rows], [each[rows] for each in state]), expected)


@pytest.mark.parametrize("part", ["updates", "windows", "lists", "rounding", "moments", "bad_ids", "not_finite"])
def test_in_the_interpreter(part: str, interpret: Interpret) -> None:
    done = interpret(INTERPRETED, part)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [make_lookup, lambda *sizes, **kinds: make_lookup(*sizes, is_compact=False, **kinds)])
def test_on_a_gpu(make: Callable[..., Lookup], dtype: torch.dtype, rule: RowRule) -> None:
    many_tokens = (70_000, 1, 40, 1040)  # whose pieces go in their order
    for sizes in ((100, 5, 64, 300), (20, 3, 64, 1024), (100, 2, 8, 1536), (7, 1, 300, 12288), many_tokens):
        lookup = make(*sizes, dtype=dtype, id_dtype=torch.int32)
        before = make_updated(lookup.table, rule)
        ids, scores, grads = lookup.row_ids.cuda(), lookup.scores.cuda(), lookup.grad_output.cuda()
        results = []
        for is_ahead in (False, True):
            got = Updated(before.table.cuda(), [each.cuda() for each in before.state])
            ordered = order_lookups(got.table, ids, scores, lookup.code_stride) if is_ahead else None
            grad_scores = fused_row_update(
                got.table, got.state, ids, scores, grads, rule, LR.cuda(), STEP.cuda(),
                code_stride=lookup.code_stride, ordered=ordered,
            )  # fmt: skip
            results.append((grad_scores, got.table, *got.state))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
        expected_scores, expected = reference_update(before, lookup, rule)
        assert relative_error(grad_scores.cpu().numpy(), expected_scores.numpy()) <= TOLERANCES["float32"]
        assert_close(got, expected)


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("has_squares", [False, True])
def test_wide_rows_repeat_on_a_gpu(has_squares: bool, rule: RowRule) -> None:
    rows, grads = torch.randn(20_000, 4096, device="cuda"), torch.randn(20_000, 4096, device="cuda")
    squares = grads.square().mean(1) if has_squares and rule.kind == "rowwise_adagrad" else None
    begun = make_updated(rows.cpu(), rule)
    updated = []
    for _ in range(3):
        got = Updated(rows.clone(), [each.cuda() for each in begun.state])
        row_update(got.table, got.state, grads, rule, LR.cuda(), STEP.cuda(), mean_squares=squares)
        updated.append(got)
    for got in updated[1:]:
        assert torch.equal(got.table, updated[0].table)
        assert all(torch.equal(one, two) for one, two in zip(got.state, updated[0].state, strict=True))


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("rows_each", [8, 400], ids=["often", "seldom"])
def test_a_captured_graph_updates_by_what_its_arguments_hold(rows_each: int, rule: RowRule) -> None:
    lookup = make_lookup(100, 5, rows_each, 300, dtype=torch.bfloat16, id_dtype=torch.uint16)
    ids, scores, grads = lookup.row_ids.cuda(), lookup.scores.cuda(), lookup.grad_output.cuda()
    lr, step = LR.cuda(), STEP.cuda()
    before = make_updated(lookup.table, rule)
    eager, captured = (Updated(before.table.cuda(), [each.cuda() for each in before.state]) for _ in range(2))

    def call(got: Updated) -> Tensor:
        return fused_row_update(got.table, got.state, ids, scores, grads, rule, lr, step, code_stride=rows_each)

    call(Updated(before.table.cuda(), [each.cuda() for each in before.state]))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad_scores = call(captured)
    for _ in range(2):
        graph.replay()
        assert torch.equal(grad_scores, call(eager))
        assert all(
            torch.equal(one, two)
            for one, two in zip([captured.table, *captured.state], [eager.table, *eager.state], strict=True)
        )
        lr.mul_(0.5)
        step.add_(1)
        ids.copy_(lookup.row_ids.flip(0))

"""gather_sum and row_gradient on the CPU against the float64 oracle: every shape, dtype and order of work."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels import RowRule, check_errors, fused_row_update, gather_sum, row_gradient
from mfdist.kernels.cpu_ids import first_bad
from mfdist.kernels.gather_sum import cpu_impl as sum_on_cpu
from mfdist.kernels.row_gradient import cpu_impl as gradient_on_cpu
from mfdist.testing import oracles
from mfdist.testing.tolerances import relative_error
from tests.kernels.lookups import (
    Lookup,
    assert_is,
    assert_matches_oracle,
    expected_gradients,
    expected_sum,
    make_lookup,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("row_dim", [1, 40, 96, 300])
def test_sizes(num_tokens: int, row_dim: int, is_compact: bool) -> None:
    assert_matches_oracle(make_lookup(num_tokens, 5, 16, row_dim, is_compact=is_compact))


@pytest.mark.parametrize("num_lookups", [0, 1, 2, 33])
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
def test_numbers_of_lookups(num_lookups: int, is_compact: bool) -> None:
    assert_matches_oracle(make_lookup(20, num_lookups, 7, 48, is_compact=is_compact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", ID_DTYPES)
def test_dtypes(dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    assert_matches_oracle(make_lookup(63, 4, 32, 100, dtype=dtype, id_dtype=id_dtype))
    assert_matches_oracle(make_lookup(63, 4, 32, 100, dtype=dtype, id_dtype=id_dtype, is_compact=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("row_dim", "num_lookups"), [(80, 1), (1000, 3), (1000, 1), (12288, 1), (12288, 3)])
def test_widths(row_dim: int, num_lookups: int, dtype: torch.dtype) -> None:
    for num_tokens in (1, 63):
        assert_matches_oracle(make_lookup(num_tokens, num_lookups, 5, row_dim, dtype=dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory that is never touched may count")
def test_more_elements_than_an_int32_counts() -> None:
    """The system gives a page only to rows that are written, so that the table takes a few kilobytes."""
    num_rows, row_dim = (1 << 22) + 3, 1024
    table = torch.empty(num_rows, row_dim, dtype=torch.bfloat16)
    assert table.numel() > 1 << 32
    ids = torch.tensor([[0, num_rows - 1], [num_rows // 2, num_rows - 1]])
    for row, value in ((0, 1.0), (num_rows // 2, 2.0), (num_rows - 1, 3.0)):
        table[row] = value
    scores, grads = torch.ones(2, 2), torch.ones(2, row_dim, dtype=torch.bfloat16)
    out = gather_sum(table, ids, scores)
    assert (out[0] == 4).all() and (out[1] == 5).all()
    lr, step = torch.ones(1), torch.ones(1, dtype=torch.int64)
    grad_scores = fused_row_update(table, [], ids, scores, grads, RowRule(kind="sgd"), lr, step)
    assert grad_scores.tolist() == [[1024, 3 * 1024], [2 * 1024, 3 * 1024]]
    assert [table[row, -1].item() for row in (0, num_rows // 2, num_rows - 1)] == [0, 1, 1]


def test_a_negative_id_in_a_table_of_more_rows_than_its_bits_count() -> None:
    ids = np.array([5, -1], np.int32).view(np.uint8)
    assert first_bad(ids, 4, 2, 1 << 40) == 1
    assert first_bad(np.array([5, 6], np.int64).view(np.uint8), 8, 2, 1 << 40) == -1


def test_zero_wide_rows() -> None:
    lookup = make_lookup(4, 3, 8, 0)
    assert gather_sum(lookup.table, lookup.row_ids, lookup.scores, 8).shape == (4, 0)


@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
def test_all_ids_equal(is_compact: bool) -> None:
    lookup = make_lookup(500, 3, 16, 40, is_compact=is_compact)
    lookup.row_ids.fill_(15)
    assert_matches_oracle(lookup)


@pytest.mark.parametrize("num_tokens", [70, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_past_the_caches(num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches send a small table down the ways of a large one: 70 tokens in chunks, 200 packed."""
    lookup = make_lookup(num_tokens, 6, 40, 160 + 32, dtype=dtype)
    expected = gather_sum(lookup.table, lookup.row_ids, lookup.scores, 40)
    monkeypatch.setattr(sum_on_cpu, "_CACHED_BYTES", 0)
    monkeypatch.setattr(sum_on_cpu, "_LOOKUPS_TOGETHER", 4)
    monkeypatch.setattr(sum_on_cpu, "_PACK_BYTES", 4 * 40 * 64 * lookup.table.itemsize)
    got = gather_sum(lookup.table, lookup.row_ids, lookup.scores, 40)
    assert torch.equal(got, expected)
    assert_is(got, expected_sum(lookup), dtype)


def test_both_ways_to_the_gradient_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = make_lookup(200, 4, 40, 100)
    by_lookup = row_gradient(lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output, 40)
    monkeypatch.setattr(gradient_on_cpu, "_MAX_OWN_ROWS", 0)
    by_row = row_gradient(lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output, 40)
    assert torch.equal(by_lookup[0], by_row[0])
    for got in (by_lookup, by_row):
        assert_is(got[1], expected_gradients(lookup)[1], torch.float32)


def test_strided_inputs() -> None:
    wide = make_lookup(40, 8, 16, 96)
    lookup = Lookup(
        wide.table[:64, ::2],
        wide.row_ids[::2, ::2],
        wide.scores.t().contiguous().t()[::2, ::2],
        wide.grad_output[::2].flip(1)[:, ::2],
        16,
    )
    assert not any(part.is_contiguous() for part in (lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output))
    assert_matches_oracle(lookup)


def test_codes_that_start_at_an_odd_byte() -> None:
    lookup = make_lookup(10, 4, 16, 40)
    codes = torch.zeros(41, dtype=torch.uint8)[1:].view(10, 4).copy_(lookup.row_ids)
    assert codes.data_ptr() % 2 == 1
    assert_matches_oracle(Lookup(lookup.table, codes, lookup.scores, lookup.grad_output, 16))


def test_an_output_shares_no_memory_with_the_table() -> None:
    table = torch.randn(4, 8)
    out = gather_sum(table, torch.tensor([[2]]), torch.ones(1, 1))
    before = table.clone()
    out.zero_()
    assert torch.equal(table, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_to_its_own_token_and_row_only(value: float) -> None:
    lookup = make_lookup(6, 3, 16, 40)
    lookup.row_ids.copy_(torch.arange(18).view(6, 3) % 16)
    lookup.table[int(lookup.row_ids[2, 1]) + 16] = value
    hit = (lookup.row_ids[:, 1] == lookup.row_ids[2, 1]).nonzero().flatten().tolist()
    out = gather_sum(lookup.table, lookup.row_ids, lookup.scores, 16)
    assert [n for n in range(6) if not out[n].isfinite().all()] == hit


@pytest.mark.parametrize("id_dtype", ID_DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_an_id_past_the_end(id_dtype: torch.dtype, backward: bool) -> None:
    ids = torch.tensor([[0, 1], [2, 12]]).to(id_dtype)
    call = row_gradient if backward else gather_sum
    grads = [torch.ones(2, 4)] if backward else []
    with pytest.raises(RowIdError, match=r'row id 12 at lookup 1 is outside table "layers.3.ffn2" \(num_rows=12\)'):
        call(torch.zeros(12, 4), ids, torch.ones(2, 2), *grads, 0, "layers.3.ffn2")  # type: ignore[operator]
    with pytest.raises(RowIdError, match=r'code 12 at lookup 1 .* table "t" \(code_stride=6\)'):
        call(torch.zeros(12, 4), ids, torch.ones(2, 2), *grads, 6, "t")  # type: ignore[operator]


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_a_negative_id(id_dtype: torch.dtype) -> None:
    ids = torch.tensor([[3, -1]]).to(id_dtype)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(RowIdError, match="row id -1 at lookup 1 is outside"):
            gather_sum(torch.zeros(12, 4, dtype=dtype), ids, torch.ones(1, 2))
        with pytest.raises(RowIdError, match="code -1 at lookup 1 is outside"):
            row_gradient(torch.zeros(12, 4, dtype=dtype), ids, torch.ones(1, 2), torch.ones(1, 4, dtype=dtype), 6)


def test_nothing_is_left_to_check_on_the_cpu() -> None:
    with pytest.raises(RowIdError):
        gather_sum(torch.zeros(1, 1), torch.tensor([[1]]), torch.ones(1, 1))
    check_errors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(3)}, r"\[3\]"),
        ({"row_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"row_ids \[N, K\]"),
        ({"row_ids": torch.zeros(2, 2, dtype=torch.int16)}, "int16"),
        ({"table": torch.zeros(8, 4, dtype=torch.int32)}, "int32"),
        ({"scores": torch.zeros(2, 2, dtype=torch.bfloat16)}, "scores must be fp32"),
        ({"scores": torch.zeros(2, 2, dtype=torch.float64)}, "scores must be fp32"),
        ({"scores": torch.zeros(2, 2, device="meta")}, "one device"),
        ({"code_stride": 3}, r"K · code_stride rows; got 8 rows, K=2, code_stride=3"),
        ({"code_stride": -4}, "code_stride=-4"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    right = {
        "table": torch.zeros(8, 4),
        "row_ids": torch.zeros(2, 2, dtype=torch.int64),
        "scores": torch.zeros(2, 2),
        "code_stride": 4,
    }
    gather_sum(**right)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        gather_sum(**{**right, **change})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        row_gradient(**{**right, **change}, grad_output=torch.zeros(2, 4))  # type: ignore[arg-type]


def test_a_gradient_of_the_wrong_shape() -> None:
    with pytest.raises(ConfigError, match=r"grad_output must be \[N, D\] = \[2, 4\]"):
        row_gradient(torch.zeros(8, 4), torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 2), torch.ones(2, 5), 4)


@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
def test_threads_and_repeats_change_no_bit(is_compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sum_on_cpu, gradient_on_cpu):
        monkeypatch.setattr(module, "_PARALLEL_WORK", 0)
    lookup = make_lookup(300, 8, 64, 200, is_compact=is_compact, id_dtype=torch.int32)
    arguments = (lookup.table, lookup.row_ids, lookup.scores)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            out = gather_sum(*arguments, lookup.code_stride)
            results.append((out, *row_gradient(*arguments, lookup.grad_output, lookup.code_stride)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_the_order_of_the_sum_is_that_of_the_lookups() -> None:
    """Large terms that cancel leave what was added after them, and lose what was added before."""
    table = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    out = gather_sum(table, torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4))
    assert out.item() == 1.0


def test_the_oracle_by_finite_differences() -> None:
    rng = np.random.default_rng(0)
    table, scores, grad = rng.normal(size=(12, 3)), rng.normal(size=(4, 2)), rng.normal(size=(4, 3))
    ids = rng.integers(0, 6, (4, 2))
    grad_table, grad_scores = oracles.row_gradient(table, ids, scores, grad, 6)
    for array, gradient in ((table, grad_table), (scores, grad_scores)):
        numeric = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept = array[index]
            sides = []
            for step in (1e-5, -1e-5):
                array[index] = kept + step
                sides.append((oracles.gather_sum(table, ids, scores, 6) * grad).sum())
            array[index] = kept
            numeric[index] = (sides[0] - sides[1]) / 2e-5
        assert relative_error(gradient, numeric) < 1e-8


@pytest.mark.large
def test_a_table_past_two_to_the_31_elements() -> None:
    """Virtual memory alone: 4.6 GB of bf16, of which only a few rows are written."""
    num_rows, row_dim = (1 << 21) + 5, 1100
    table = torch.empty(num_rows, row_dim, dtype=torch.bfloat16)
    ids = torch.tensor([[0, num_rows - 1], [num_rows - 1, num_rows // 2]])
    table[ids.flatten()] = torch.randn(4, row_dim).to(torch.bfloat16)
    rows = table[ids].double()
    scores = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert_is(gather_sum(table, ids, scores), (rows * scores.double()[..., None]).sum(1).numpy(), torch.bfloat16)
    grad = torch.randn(2, row_dim).to(torch.bfloat16)
    grad_table, grad_scores = row_gradient(table, ids, scores, grad)
    assert_is(grad_table[num_rows - 1], (2 * grad[0].double() + 3 * grad[1].double()).numpy(), torch.bfloat16)
    assert_is(grad_scores, (rows * grad.double()[:, None]).sum(-1).numpy(), torch.float32)


def test_a_lookup_leaves_torchs_number_of_threads_alone() -> None:
    """Numba's pool, when it starts, sets OpenMP's number for the whole process; a fresh one shows it."""
    code = """
import torch
from mfdist.kernels import gather_sum
torch.set_num_threads(1)
scores = torch.rand(4096, 8, requires_grad=True)
for threads in (1, 3, 1):
    torch.set_num_threads(threads)
    gather_sum(torch.randn(8 * 16, 64), torch.zeros(4096, 8, dtype=torch.uint8), scores, 16).sum().backward()
    assert torch.get_num_threads() == threads, (torch.get_num_threads(), threads)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

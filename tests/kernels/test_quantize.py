"""Quantised rows: what rounding costs, their lookup against the reference, and what is refused."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels import QuantizedRows, gather_sum, quantize, quantized_gather_sum
from mfdist.kernels.gather_sum import cpu_impl as sum_on_cpu
from mfdist.kernels.quantize import dequantize, reference, rows
from mfdist.testing import oracles
from tests.kernels.lookups import assert_is, make_lookup

KINDS = (torch.int8, torch.float8_e4m3fn)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def wide_range(num_rows: int, row_dim: int) -> Tensor:
    """Return rows whose values span many powers of two, within a row and between rows."""
    spread = torch.randn(num_rows, row_dim) * torch.exp(4 * torch.randn(num_rows, row_dim))
    return spread * torch.exp(3 * torch.randn(num_rows, 1))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_stays_within_its_bound(kind: torch.dtype, source: torch.dtype) -> None:
    table = wide_range(200, 300).clamp(-6e4, 6e4).to(source)
    quantized = quantize(table, kind)
    assert quantized.values.dtype == kind and quantized.scales.dtype == torch.float32
    exact = table.double()
    error = (dequantize(quantized, torch.float64) - exact).abs()
    largest = exact.abs().amax(1, keepdim=True)
    bound = largest / 253 if kind == torch.int8 else torch.maximum(exact.abs() / 15, largest / 2**18)
    assert (error <= bound).all()
    assert error.max() > 0  # it is lossy, or there would be nothing to bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_largest_value_uses_the_whole_range(kind: torch.dtype) -> None:
    values = quantize(wide_range(50, 64), kind).values.float()
    assert values.abs().amax(1).tolist() == [rows.LARGEST[kind]] * 50


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_size(kind: torch.dtype) -> None:
    table = torch.tensor([[0.0, -0.0, 0.0], [1e-44, -1e-45, 0.0], [3e38, -3e38, 1e38]])
    got = dequantize(quantize(table, kind))
    assert got.isfinite().all()
    assert not got[:2].abs().gt(1e-37).any()
    assert torch.allclose(got[2], table[2], rtol=1 / 16)
    for shape in ((0, 4), (3, 0)):
        empty = quantize(torch.empty(shape), kind)
        assert empty.values.shape == shape and empty.scales.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(kind: torch.dtype, value: float) -> None:
    table = torch.randn(4, 40)
    table[2, 7] = value
    quantized = quantize(table, kind)
    assert dequantize(quantized).isnan().all(dim=1).tolist() == [False, False, True, False]
    ids = torch.tensor([[0, 1], [2, 3]])
    assert quantized_gather_sum(quantized, ids, torch.ones(2, 2)).isnan().any(dim=1).tolist() == [False, True]


def test_large_tables_are_quantised_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(37, 20)
    before = table.clone()
    whole = quantize(table)
    assert torch.equal(table, before)
    monkeypatch.setattr(rows, "_PART_VALUES", 100)
    parts = quantize(table)
    assert torch.equal(parts.values, whole.values) and torch.equal(parts.scales, whole.scales)


def check(lookup_shape: tuple[int, int, int, int], kind: torch.dtype, dtype: torch.dtype, *, is_compact: bool) -> None:
    lookup = make_lookup(*lookup_shape, is_compact=is_compact)
    quantized = quantize(lookup.table, kind)
    arguments = (quantized, lookup.row_ids, lookup.scores, lookup.code_stride)
    got = quantized_gather_sum(*arguments, "t", dtype)
    assert_is(got, reference.quantized_gather_sum(*arguments).numpy(), dtype)
    exact = (lookup.row_ids.long().numpy(), lookup.scores.double().numpy(), lookup.code_stride)
    assert_is(got, oracles.gather_sum(dequantize(quantized, torch.float64).numpy(), *exact), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (5, 0, 8, 8), (1, 1, 16, 1), (63, 5, 16, 40), (100, 3, 7, 300)])
def test_sums_are_the_references(shape: tuple[int, int, int, int], is_compact: bool, kind: torch.dtype) -> None:
    check(shape, kind, torch.float32, is_compact=is_compact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_in_other_dtypes(dtype: torch.dtype, kind: torch.dtype) -> None:
    check((63, 5, 16, 96), kind, dtype, is_compact=True)


@pytest.mark.parametrize("num_tokens", [70, 200])
def test_tables_past_the_caches(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_on_cpu, "_CACHED_BYTES", 0)
    for kind in KINDS:
        check((num_tokens, 6, 40, 160), kind, torch.float32, is_compact=True)


def test_every_byte_of_fp8_is_read_as_torch_reads_it() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits.view(torch.float8_e4m3fn)
    table = QuantizedRows(values.view(256, 1), torch.ones(256))
    got = quantized_gather_sum(table, torch.arange(256).view(-1, 1), torch.ones(256, 1)).flatten()
    is_number = ~values.float().isnan()
    assert torch.equal(got[is_number], values.float()[is_number])
    assert is_number.sum() == 254


def test_the_lookup_comes_close_to_that_of_the_rows_before() -> None:
    lookup = make_lookup(200, 16, 64, 128)
    exact = gather_sum(lookup.table, lookup.row_ids, lookup.scores, 64)
    for kind, bound in ((torch.int8, 0.01), (torch.float8_e4m3fn, 0.03)):
        got = quantized_gather_sum(quantize(lookup.table, kind), lookup.row_ids, lookup.scores, 64)
        assert (got - exact).norm() / exact.norm() < bound


def test_torch_accepts_it() -> None:
    lookup = make_lookup(9, 3, 8, 5)
    for kind in KINDS:
        quantized = quantize(lookup.table, kind)
        arguments = (quantized.as_bytes, quantized.scales, lookup.row_ids, lookup.scores, 8, "t", torch.bfloat16)
        opcheck(torch.ops.mfdist.quantized_gather_sum.default, arguments)
        compiled = torch.compile(
            lambda scores, held=quantized: quantized_gather_sum(held, lookup.row_ids, scores, 8) * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        expected = quantized_gather_sum(quantized, lookup.row_ids, lookup.scores, 8) * 2
        assert torch.equal(compiled(lookup.scores), expected)


def test_a_backward_is_refused() -> None:
    lookup = make_lookup(9, 3, 8, 5)
    out = quantized_gather_sum(quantize(lookup.table), lookup.row_ids, lookup.scores.requires_grad_(), 8, "layers.3")
    with pytest.raises(NotImplementedError, match=r'are for inference and have no backward; got one .* "layers.3"'):
        out.sum().backward()  # type: ignore[no-untyped-call]


def test_an_id_past_the_end() -> None:
    quantized = quantize(torch.ones(12, 4))
    with pytest.raises(RowIdError, match=r'row id 12 at lookup 1 is outside table "layers.3.ffn2" \(num_rows=12\)'):
        quantized_gather_sum(quantized, torch.tensor([[0, 1], [2, 12]]), torch.ones(2, 2), 0, "layers.3.ffn2")


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ConfigError, match=r"must be \[R, D\] in fp32, fp16 or bf16; got \[3\] in float32"):
        quantize(torch.ones(3))
    with pytest.raises(ConfigError, match=r"quantised to torch.int8 or torch.float8_e4m3fn; got torch.int16"):
        quantize(torch.ones(3, 4), torch.int16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": QuantizedRows(torch.ones(8, 4), torch.ones(8))}, "with scales .R. in fp32"),
        ({"rows": QuantizedRows(torch.ones(8, 4, dtype=torch.int8), torch.ones(8).half())}, "with scales .R. in fp32"),
        ({"rows": QuantizedRows(torch.ones(8, 4, dtype=torch.int8), torch.ones(7))}, "one scale each"),
        (
            {"row_ids": torch.zeros(2, 2, dtype=torch.int16)},
            "rows in int8, float8_e4m3fn and ids in uint8",
        ),
        ({"scores": torch.ones(2, 2).double()}, "scores must be fp32"),
        ({"dtype": torch.float64}, "summed to fp32, fp16 or bf16"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "rows": quantize(torch.ones(8, 4)),
        "row_ids": torch.zeros(2, 2, dtype=torch.int64),
        "scores": torch.zeros(2, 2),
        "dtype": torch.float32,
    }
    quantized_gather_sum(**right)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        quantized_gather_sum(**{**right, **change})  # type: ignore[arg-type]


@pytest.mark.large
def test_a_table_past_two_to_the_31_elements() -> None:
    """Virtual memory alone: 2.3 GB, of which only a few rows are written."""
    num_rows, row_dim = (1 << 21) + 5, 1100
    quantized = QuantizedRows(torch.empty(num_rows, row_dim, dtype=torch.int8), torch.zeros(num_rows))
    ids = torch.tensor([[0, num_rows - 1], [num_rows - 1, num_rows // 2]])
    quantized.values[ids.flatten()] = torch.randint(-127, 128, (4, row_dim), dtype=torch.int8)
    quantized.scales[ids.flatten()] = torch.rand(4)
    scores = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    got = quantized_gather_sum(quantized, ids, scores)
    assert_is(got, reference.quantized_gather_sum(quantized, ids, scores).numpy(), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [5, 200])
def test_on_a_gpu(num_tokens: int, kind: torch.dtype) -> None:
    lookup = make_lookup(num_tokens, 5, 64, 300, id_dtype=torch.int32)
    on_cpu, on_gpu = quantize(lookup.table, kind), quantize(lookup.table.cuda(), kind)
    assert torch.equal(on_gpu.values.cpu().view(torch.uint8), on_cpu.values.view(torch.uint8))
    assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
    got = quantized_gather_sum(on_gpu, lookup.row_ids.cuda(), lookup.scores.cuda(), 64)
    assert_is(got, reference.quantized_gather_sum(on_cpu, lookup.row_ids, lookup.scores, 64).numpy(), torch.float32)

"""A quantised table in place of the one it was made of: as close as its rows, and for inference alone."""

from pathlib import Path

import pytest
import torch

from mfdist import LocalTable, MemoryLayer
from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels.quantize import dequantize, quantize, reference
from mfdist.optim import RowSGD
from mfdist.spec import Region, TableSpec
from mfdist.tables.quantized import QuantizedTable
from tests.kernels.lookups import assert_is

KINDS = (torch.int8, torch.float8_e4m3fn)
SPEC = TableSpec(name="layers.3.ffn2", num_rows=48, row_dim=20)


def ids_and_scores() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 16, (30, 3), dtype=torch.uint8), torch.rand(30, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_looks_up_what_its_rows_stand_for(kind: torch.dtype) -> None:
    local = LocalTable(SPEC)
    table = QuantizedTable.of(local, kind)
    ids, scores = ids_and_scores()
    assert_is(
        table(ids, scores, code_stride=16), reference.quantized_gather_sum(table.rows, ids, scores, 16), torch.float32
    )
    assert torch.equal(dequantize(table.rows), dequantize(quantize(local.weight, kind)))
    with pytest.raises(RowIdError, match=r'row id 48 .* table "layers.3.ffn2"'):
        table(torch.tensor([[48]]), torch.ones(1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_working(kind: torch.dtype) -> None:
    layer = MemoryLayer(32, 40, bits=8)
    x = torch.randn(2, 9, 32)
    before = layer(x).detach()
    layer.table = QuantizedTable.of(layer.table, kind)
    with torch.inference_mode():
        after = layer(x)
    assert after.dtype == before.dtype
    assert 0 < (after - before).norm() / before.norm() < 0.04
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_it_takes_less_memory() -> None:
    table = QuantizedTable.of(LocalTable(TableSpec(name="t", num_rows=1000, row_dim=512, dtype=torch.bfloat16)))
    assert sum(part.nbytes for part in table.buffers()) == 1000 * (512 + 4)
    assert list(table.parameters()) == []
    assert table.spec.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_changes_results_and_no_row(kind: torch.dtype) -> None:
    table = QuantizedTable.of(LocalTable(SPEC), kind)
    before = table.rows
    ids, scores = ids_and_scores()
    expected = table(ids, scores, code_stride=16)
    table.half()
    assert table(ids, scores, code_stride=16).dtype == torch.float16
    table.to(torch.float32)
    assert torch.equal(table.rows.values.view(torch.uint8), before.values.view(torch.uint8))
    assert torch.equal(table.rows.scales, before.scales) and table.rows.scales.dtype == torch.float32
    assert torch.equal(table(ids, scores, code_stride=16), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_its_state_is_saved_and_loaded(kind: torch.dtype, tmp_path: Path) -> None:
    table, other = QuantizedTable.of(LocalTable(SPEC), kind), QuantizedTable.of(LocalTable(SPEC), kind)
    torch.save(table.state_dict(), tmp_path / "table.pt")
    other.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    ids, scores = ids_and_scores()
    assert torch.equal(table(ids, scores, code_stride=16), other(ids, scores, code_stride=16))


def test_it_is_not_trained() -> None:
    table = QuantizedTable.of(LocalTable(SPEC))
    ids, scores = ids_and_scores()
    out = table(ids, scores.requires_grad_(), code_stride=16)
    with pytest.raises(NotImplementedError, match=r'have no backward; got one through table "layers.3.ffn2"'):
        out.sum().backward()
    with pytest.raises(NotImplementedError, match=r'got fuse\(.*\) of table "layers.3.ffn2"'):
        table.fuse(RowSGD(lr=0.1))


def test_a_part_of_a_table_is_refused() -> None:
    class Half(LocalTable):
        @property
        def region(self) -> Region:
            return Region(rows=(0, 24), columns=(0, 20))

    with pytest.raises(ConfigError, match="a table is quantised whole; got the part"):
        QuantizedTable.of(Half(SPEC))
    with pytest.raises(ConfigError, match=r'must be 48 × 20 for "layers.3.ffn2"; got \[3, 20\]'):
        QuantizedTable(SPEC, quantize(torch.ones(3, 20)))


def test_it_tells_what_its_rows_are() -> None:
    assert repr(QuantizedTable.of(LocalTable(SPEC))).endswith("row_dim=20, dtype=float32, rows=int8)")


@pytest.mark.gpu
def test_it_moves_to_a_gpu_and_back() -> None:
    table = QuantizedTable.of(LocalTable(SPEC))
    before = table.rows
    assert table.cuda().rows.values.is_cuda
    table.cpu()
    assert torch.equal(table.rows.values, before.values) and torch.equal(table.rows.scales, before.scales)


def test_only_rows_that_are_there_as_they_are_can_be_quantised():
    table = QuantizedTable.of(LocalTable(TableSpec(name="mine", num_rows=8, row_dim=4)))
    with pytest.raises(ConfigError, match='got "mine" as a QuantizedTable; give the table that it was made of'):
        QuantizedTable.of(table)

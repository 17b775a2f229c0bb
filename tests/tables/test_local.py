"""LocalTable keeps the contract of every table, and is an ordinary module besides."""

import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.testing.table_conformance import TableConformance


def local(rows):
    table = LocalTable(TableSpec(name="local", num_rows=rows.shape[0], row_dim=rows.shape[1], dtype=rows.dtype))
    with torch.no_grad():
        table.weight.copy_(rows)
    return table


class TestLocalTable(TableConformance):
    def make_table(self, rows):
        return local(rows)


def test_autocast_reads_rows_in_its_dtype_and_keeps_the_gradient_of_the_parameter():
    table, scores = local(torch.randn(16, 8)), torch.randn(5, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = table(torch.randint(0, 16, (5, 2)), scores)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and table.weight.grad.dtype == torch.float32


def test_rows_start_normal_with_the_given_spread():
    table = LocalTable(TableSpec(name="t", num_rows=500, row_dim=100), std=0.3)
    assert table.weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert table.weight.mean().item() == pytest.approx(0, abs=0.01)


def test_a_table_on_meta_makes_no_rows():
    spec = TableSpec(name="huge", num_rows=2**40, row_dim=4096, dtype=torch.bfloat16)
    assert LocalTable(spec, device="meta").weight.is_meta
    assert spec.num_bytes == 2**53


def test_specs_that_are_no_table():
    with pytest.raises(ConfigError, match=r'at least one row of one column; got num_rows=0, row_dim=4 for "t"'):
        TableSpec(name="t", num_rows=0, row_dim=4)
    with pytest.raises(ConfigError, match=r"rows must be floating point; got torch\.int8"):
        TableSpec(name="t", num_rows=1, row_dim=4, dtype=torch.int8)

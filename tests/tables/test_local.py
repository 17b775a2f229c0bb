"""LocalTable keeps the contract of every table, and is an ordinary module besides."""

import copy
import shutil

import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.optim import RowAdagrad, RowAdam, RowSGD
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.testing.fused_conformance import FusedConformance
from mfdist.testing.table_conformance import TableConformance


def local(rows):
    table = LocalTable(TableSpec(name="local", num_rows=rows.shape[0], row_dim=rows.shape[1], dtype=rows.dtype))
    with torch.no_grad():
        table.weight.copy_(rows)
    return table


class TestLocalTable(TableConformance, FusedConformance):
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


def fused(optimizer=RowAdagrad(lr=0.1), num_rows=16, dtype=torch.bfloat16):  # noqa: B008
    return LocalTable(TableSpec(name="t", num_rows=num_rows, row_dim=8, dtype=dtype), std=1.0, fuse=optimizer)


def train(table, seed=0):
    made = torch.Generator().manual_seed(seed)
    scores = torch.randn(20, 2, generator=made, requires_grad=True)
    out = table(torch.randint(0, 8, (20, 2), generator=made), scores, code_stride=8)
    out.float().square().sum().backward()
    return out


def test_a_fused_table_is_no_parameter_to_train_and_its_states_are_in_no_state_dict():
    table = fused()
    assert [parameter.requires_grad for parameter in table.parameters()] == [False]
    assert list(table.state_dict()) == ["weight"] and not list(table.buffers())
    assert "fuse=RowAdagrad(lr=0.1" in repr(table)


def test_a_copy_of_a_fused_table_goes_its_own_way():
    table = fused(RowAdam(lr=0.1, state_dtype=torch.bfloat16))
    train(table)
    again = copy.deepcopy(table)
    for each in (table, again):
        train(each, seed=1)
    assert torch.equal(table.weight, again.weight)
    assert all(
        torch.equal(a, b)
        for a, b in zip(table.row_state.tensors.values(), again.row_state.tensors.values(), strict=True)
    )
    assert table.row_state.tensors["exp_avg"].data_ptr() != again.row_state.tensors["exp_avg"].data_ptr()
    train(table)
    assert table.row_state.num_updates == 3 and again.row_state.num_updates == 2


@pytest.mark.parametrize("optimizer", [RowSGD(lr=0.1), RowAdagrad(lr=0.1), RowAdam(lr=0.1)], ids=lambda o: o.rule.kind)
def test_compiled_without_graph_breaks_it_trains_to_the_same_bits(optimizer):
    plain, table = fused(optimizer), fused(optimizer)
    table.load_state_dict(plain.state_dict())
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    number = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(3):
        for each in (plain, table):
            each.row_state.lr = 0.1 / (step + 1)
        train(plain, step)
        train(compiled, step)
    assert torch.equal(plain.weight, table.weight)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == number + 1  # one for all rates and steps


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor_rows_change_in_place_and_nothing_of_their_size_is_copied():
    plain, table = fused(RowAdam(lr=0.1), num_rows=1 << 16), fused(RowAdam(lr=0.1), num_rows=1 << 16)
    table.load_state_dict(plain.state_dict())
    compiled, at = torch.compile(table, fullgraph=True), table.weight.data_ptr()
    scores, ids = torch.randn(20, 2, requires_grad=True), torch.randint(0, 8, (20, 2))

    def step(each):
        each(ids, scores).float().square().sum().backward()

    step(compiled)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(compiled)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < table.weight.nbytes / 100 and table.weight.data_ptr() == at
    for _ in range(2):
        step(plain)
    assert torch.equal(plain.weight, table.weight)


def test_autocast_reads_fused_rows_as_they_are():
    table = fused(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = train(table)
    assert out.dtype == torch.bfloat16 and table.weight.dtype == torch.float32
    assert table.row_state.tensors["accumulator"].any()


def test_a_change_of_dtype_or_device_takes_the_states_along_unrounded():
    table = fused(dtype=torch.float32)
    train(table)
    kept = table.row_state.tensors["accumulator"].clone()
    table.bfloat16()
    assert table.weight.dtype == torch.bfloat16 and torch.equal(table.row_state.tensors["accumulator"], kept)
    train(table)
    assert table.row_state.num_updates == 2
    meta = table.to("meta")
    assert meta.row_state.tensors["accumulator"].is_meta
    meta.to_empty(device="cpu")  # which leaves any bytes in what it makes
    assert meta.row_state.lr == pytest.approx(0.1) and meta.row_state.num_updates == 0
    meta.reset_parameters()
    assert not meta.row_state.tensors["accumulator"].any() and meta.row_state.num_updates == 0
    assert meta.row_state.lr == pytest.approx(0.1)
    train(meta)


def test_a_cast_is_shown_and_told_to_whoever_plans():
    table = fused(dtype=torch.float32).to(torch.bfloat16)
    assert table.spec.dtype == torch.bfloat16 and "dtype=bfloat16" in repr(table)
    assert table.to("meta").spec.dtype == torch.bfloat16


def test_looking_up_without_gradients_trains_nothing():
    table = fused()
    before = table.weight.clone()
    with torch.no_grad():
        table(torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert torch.equal(table.weight, before) and table.row_state.num_updates == 0


def test_a_table_is_frozen_by_fuse_none_and_its_states_come_back():
    table, before = fused(), fused().weight.clone()
    with torch.no_grad():
        table.weight.copy_(before)
    table.eval().requires_grad_(False)
    train(table)
    assert not torch.equal(table.weight, before) and table.row_state.num_updates == 1  # neither stops it
    kept = table.row_state.tensors, table.row_state.num_updates
    before = table.weight.clone()
    table.fuse(None).requires_grad_(False)
    train(table)
    assert torch.equal(table.weight, before) and table.weight.grad is None
    table.fuse(RowAdagrad(lr=0.1)).row_state.load(*kept)
    assert torch.equal(table.row_state.tensors["accumulator"], kept[0]["accumulator"])
    assert table.row_state.num_updates == 1

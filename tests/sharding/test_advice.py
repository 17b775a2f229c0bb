"""Advice where nothing fits: what it says would fit does, and what it says would not does not."""

from dataclasses import replace

import pytest
import torch

from mfdist.sharding.advice import advise, size
from mfdist.sharding.planner import decide
from mfdist.sharding.topology import h100
from tests.sharding.models import memoryformer, workload

SPECS, LOADS = memoryformer(num_layers=4)


def advice(share, **changes):
    """Return advice for memory of a share of what the leanest plan needs."""
    work = workload(LOADS, **changes)
    leanest = decide(SPECS, h100(8, memory_bytes=1), work).cost.rank_bytes.max()
    machine = h100(8, memory_bytes=int(leanest * share / 0.9))
    decision = decide(SPECS, machine, work)
    assert not decision.fits
    return advise(decision), machine, work


def changed(machine, work, what):
    """Make a change by its words."""
    specs = SPECS
    for part in what.split(" and "):
        if "micro-batches" in part:
            work = replace(work, micro_batches=int(part.split()[0]))
        elif "in backward" in part:
            work = replace(work, is_fused=True)
        elif "states in bf16" in part:
            work = replace(work, state_dtype=torch.bfloat16)
        elif "states in a byte" in part:
            work = replace(work, state_dtype=torch.uint8)
        elif "Adagrad" in part:
            work = replace(work, rule="rowwise_adagrad")
        elif "rows in bf16" in part:
            specs = [replace(spec, dtype=torch.bfloat16) for spec in specs]
        else:
            machine = machine.resized(int(part.split()[0]))
    return decide(specs, machine, work)


@pytest.mark.parametrize("share", [0.95, 0.5, 0.3])
def test_each_change_is_worth_what_is_said(share):
    found, machine, work = advice(share)
    assert any(change.fits for change in found.changes)
    for change in found.changes:
        again = changed(machine, work, change.what)
        assert again.fits == change.fits, change.what
        assert int(again.cost.rank_bytes.max()) == change.rank_bytes


def test_the_world_it_names_is_the_smallest():
    found, machine, work = advice(0.5)
    ranks = next(int(change.what.split()[0]) for change in found.changes if change.what.endswith("ranks"))
    assert decide(SPECS, machine.resized(ranks), work).fits
    assert not decide(SPECS, machine.resized(ranks - 8), work).fits


def test_the_tables_it_names_are_those_that_are_too_much():
    found, machine, _ = advice(0.9)
    assert found.unplaced
    assert {table.name for table in found.unplaced} < {spec.name for spec in SPECS}
    assert sum(table.rank_bytes for table in found.unplaced) >= found.missing_bytes > 0
    assert found.missing_bytes == found.rank_bytes - machine.usable_bytes
    sizes = [table.rank_bytes for table in found.unplaced]
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_changed_already_is_not_advised():
    found, _, _ = advice(0.9, rule="rowwise_adagrad", is_fused=True)
    assert [change.what for change in found.changes if "ranks" not in change.what] == [
        "rows in bf16 (model.table_dtype)"
    ]


def test_host_memory_holds_all_rows_and_states():
    _, machine, work = advice(0.5)
    total = sum(spec.num_bytes for spec in SPECS) * 3
    for memory, fits in ((total, True), (total - 1, False)):
        found = advise(decide(SPECS, replace(machine, host_memory_bytes=memory), work))
        servers = next(change for change in found.changes if change.what.startswith("table servers"))
        assert (servers.fits, servers.rank_bytes) == (fits, total)


def test_sizes_read_well():
    assert [size(value) for value in (3 << 20, 5 << 29, 2 << 40)] == ["3 MiB", "2.5 GiB", "2.0 TiB"]

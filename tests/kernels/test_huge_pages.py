"""Memory of large tensors: in huge pages where there are enough, and left alone everywhere else."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.kernels import huge_pages
from mfdist.spec import TableSpec
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.shard import Shard
from mfdist.tables.local import LocalTable

SIZE = 64 << 20


def is_marked(tensor):
    """Return whether the middle of a tensor's memory is marked for huge pages."""
    place, flags = tensor.data_ptr() + tensor.nbytes // 2, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            start, end = (int(part, 16) for part in head.split("-"))
            flags = start <= place < end
        elif head == "VmFlags:" and flags:
            return "hg" in line.split()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such advice")
def test_large_memory_is_marked_where_enough_huge_pages_are_free():
    if huge_pages._free_bytes() < 8 * SIZE:  # other programs take some between the question and the answer
        pytest.skip("this machine has too few free huge pages")
    # Memory of its own: the C library may hand out again what NumPy has marked for a large array that is gone.
    own = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    large, small = torch.empty(SIZE, dtype=torch.uint8), torch.frombuffer(own, dtype=torch.uint8)
    assert huge_pages.in_huge_pages(large) is large and is_marked(large)
    assert huge_pages.in_huge_pages(small) is small and not is_marked(small)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such advice")
def test_tables_shards_and_what_is_loaded_lie_in_them(tmp_path):
    if huge_pages._free_bytes() < 12 * SIZE:
        pytest.skip("this machine has too few free huge pages")
    spec = TableSpec(name="t", num_rows=SIZE // 1024, row_dim=256)
    assert is_marked(LocalTable(spec).weight)
    shard = Shard(ShardSpec(table=spec, region=spec.region, optimizer=None, std=0.1, seed=0))
    assert is_marked(shard.rows)
    directory = CheckpointDirectory(tmp_path)
    tables = {"t": TableState(weight=shard.rows, optimizer={})}
    directory.save(CheckpointState(step=1, tables=tables, dense={}, attributes={}))
    assert is_marked(directory.load().tables["t"].weight)


def test_what_has_no_memory_here_is_left_alone():
    with FakeTensorMode():
        assert huge_pages.in_huge_pages(torch.empty(SIZE, dtype=torch.uint8)).shape == (SIZE,)
    assert huge_pages.in_huge_pages(torch.empty(SIZE, dtype=torch.uint8, device="meta")).is_meta

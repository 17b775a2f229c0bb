"""What FSDP2 spreads over ranks is saved by each rank for itself, and loads on any number of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zarr
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mfdist.checkpoint import grid
from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.host_copy import num_bytes
from mfdist.checkpoint.ranks import StoreRanks
from mfdist.checkpoint.state import CheckpointState
from mfdist.errors import ConfigError
from mfdist.testing.run_ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def trained(is_sharded: bool) -> dict[str, Tensor]:
    """Parameters and Adam's states after a step, of a model that all ranks train on the same data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 70), nn.Linear(70, 5), nn.Conv1d(3, 4, 2), nn.LayerNorm(1))
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = (parameter.detach() * 0.5 + 1) ** 2
    optimizer.step()
    found = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return found


def save(rank: int, path: Path) -> tuple[int, int]:
    """Save in the background, and overwrite at once; return the bytes this rank and all ranks hold."""
    grid.MIN_FILE_BYTES, grid.MIN_COLUMNS = 2048, 4
    dense = trained(is_sharded=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dense |= {
        name: distribute_tensor(torch.arange(60.0).reshape(shape), mesh, [placement], src_data_rank=None)
        for name, shape, placement in (
            ("columns", (6, 10), Shard(1)),
            ("one row", (1, 60), Shard(0)),
            ("cube", (4, 3, 5), Shard(0)),
            ("whole", (60,), Replicate()),
        )
    }
    state = CheckpointState(step=3, tables={}, dense=dense, attributes={})
    directory = CheckpointDirectory(path, ranks=StoreRanks.of_process_group(deadline_s=30))
    with BackgroundSaver(directory) as saver:
        saver.save(state)
        for tensor in dense.values():
            tensor.zero_()
        [saved] = saver.wait()
    return num_bytes(state), saved.info.num_bytes


def load(rank: int, path: Path) -> None:
    """Load into a sharded model of another number of ranks, and into plain tensors."""
    expected, target = trained(is_sharded=False), trained(is_sharded=True)
    for tensor in target.values():
        tensor.fill_(-1)
    directory = CheckpointDirectory(path, ranks=StoreRanks.of_process_group(deadline_s=30))
    state = CheckpointState(step=0, tables={}, dense=target, attributes={})
    assert directory.load_into(state, allow_unused=True).step == 3
    for name, tensor in target.items():
        assert isinstance(tensor, DTensor) != name.endswith("/step")
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert whole.equal(expected[name]), name


@pytest.mark.parametrize(("num_before", "num_after"), [(2, 3), (3, 2)])
def test_each_rank_saves_its_part_and_others_load_theirs(
    pool: RankPool, tmp_path: Path, num_before: int, num_after: int
) -> None:
    held = pool.run(save, num_before, tmp_path)
    expected = trained(is_sharded=False)
    num_bytes_of_all = sum(tensor.nbytes for tensor in expected.values())
    assert sum(mine for mine, _ in held) < num_bytes_of_all * 1.2  # nothing is gathered
    directory = CheckpointDirectory(tmp_path)
    assert directory.verify() == []
    loaded = directory.load()
    for name, tensor in expected.items():
        assert loaded.dense[name].equal(tensor), name
    for name, shape in (("columns", (6, 10)), ("one row", (1, 60)), ("cube", (4, 3, 5)), ("whole", (60,))):
        assert loaded.dense[name].equal(torch.arange(60.0).reshape(shape)), name
    weight = zarr.open(tmp_path / "step-000000003", mode="r")["dense/model/0.weight"]
    assert (weight[...] == expected["model/0.weight"].numpy()).all()
    pool.run(load, num_after, tmp_path)


def refusals(rank: int, path: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    odd = {
        "sum": DTensor.from_local(torch.ones(4), mesh, [Partial()]),
        "cube": distribute_tensor(torch.ones(2, 4, 4), mesh, [Shard(1)]),
    }
    said = []
    for name, tensor in odd.items():
        state = CheckpointState(step=1, tables={}, dense={name: tensor}, attributes={})
        with pytest.raises(ConfigError) as caught:
            CheckpointDirectory(path, ranks=StoreRanks.of_process_group(deadline_s=30)).save(state)
        said.append(str(caught.value))
    return said


def test_what_is_no_rectangle_is_refused(pool: RankPool, tmp_path: Path) -> None:
    for incomplete, uneven in pool.run(refusals, 2, tmp_path):
        assert "'sum' is placed as (Partial(sum),); call redistribute first" in incomplete
        assert "sharded along its first one; 'cube' is placed as (Shard(dim=1),)" in uneven

"""Golden checkpoints, one of each format there ever was: they load for ever."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.manifest import READ_VERSIONS, Manifest
from mfdist.spec import Region

FOLDER = Path(__file__).parent


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (numbers / 8 - 5).reshape(shape).to(dtype)


#: What every golden step holds.
TABLES = {
    "blocks.0.qkv": {
        "weight": ramp(100, 6, dtype=torch.bfloat16),
        "exp_avg": ramp(100, 6),
        "row_sum": ramp(100),
    },
    "odd name/é": {"weight": ramp(3, 2)},
}
DENSE = {
    "model/head.weight": ramp(4, 3, dtype=torch.float16),
    "optimizer/step": torch.tensor(7.0),
    "rng/cpu": torch.arange(5, dtype=torch.uint8),
    "cube": ramp(30, 3, 2),
    "empty": torch.empty(0, 3),
    "mask": torch.tensor([True, False]),
}
ATTRIBUTES = {"config": "name = 'x'", "losses": [1.5, None, True]}


def test_there_is_a_golden_step_of_each_format() -> None:
    found = {Manifest.read(path).step for path in FOLDER.glob("format-*/step-*")}
    assert found == {7}
    assert {path.name for path in FOLDER.glob("format-*")} == {f"format-{version}" for version in READ_VERSIONS}


@pytest.mark.parametrize("version", READ_VERSIONS)
def test_a_golden_step_loads(version: int) -> None:
    directory = CheckpointDirectory(FOLDER / f"format-{version}")
    assert directory.verify() == []
    state = directory.load()
    assert state.step == 7
    assert state.attributes == ATTRIBUTES
    assert list(state.dense) == list(DENSE)
    for name, expected in DENSE.items():
        assert state.dense[name].dtype == expected.dtype
        assert torch.equal(state.dense[name], expected), name
    for name, arrays in TABLES.items():
        table = state.tables[name]
        for key, value in {"weight": table.weight, **table.optimizer}.items():
            assert value.dtype == arrays[key].dtype
            assert torch.equal(value, arrays[key]), (name, key)


@pytest.mark.parametrize("version", READ_VERSIONS)
def test_a_golden_step_loads_in_parts(version: int) -> None:
    region = Region(rows=(13, 77), columns=(1, 4))
    [shard] = (
        CheckpointDirectory(FOLDER / f"format-{version}").load(shards={"blocks.0.qkv": [region]}).shards["blocks.0.qkv"]
    )
    arrays = TABLES["blocks.0.qkv"]
    assert torch.equal(shard.weight, arrays["weight"][13:77, 1:4])
    assert torch.equal(shard.optimizer["exp_avg"], arrays["exp_avg"][13:77, 1:4])
    assert torch.equal(shard.optimizer["row_sum"], arrays["row_sum"][13:77])

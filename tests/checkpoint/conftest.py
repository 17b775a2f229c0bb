"""States to save, and the oracle that compares them bit for bit."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Everything a checkpoint must keep of a tensor, without floating-point comparison."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


def contents(state: CheckpointState) -> dict[str, object]:
    return {
        "step": state.step,
        "attributes": state.attributes,
        "dense": {name: bits(tensor) for name, tensor in state.dense.items()},
        "tables": {
            name: {"weight": bits(table.weight)} | {key: bits(value) for key, value in table.optimizer.items()}
            for name, table in state.tables.items()
        },
    }


def small_state(step: int = 1, seed: int = 0) -> CheckpointState:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    table = TableState(weight=rows(64, 24).bfloat16(), optimizer={"exp_avg": rows(64, 24), "row_sum": rows(64)})
    return CheckpointState(
        step=step,
        tables={"blocks.0.qkv": table, "blocks.1.qkv": TableState(weight=rows(16, 8))},
        dense={"model/head.weight": rows(8, 3), "optimizer/step": torch.tensor(float(step)), "rng/cpu": rows(5).byte()},
        attributes={"config": 'name = "x"', "position": {"sequence": 7}, "losses": [1.5, 2, None, True]},
    )


@pytest.fixture(scope="session", name="contents")
def _contents() -> Callable[[CheckpointState], dict[str, object]]:
    return contents


@pytest.fixture(scope="session", name="small_state")
def _small_state() -> Callable[..., CheckpointState]:
    return small_state


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)

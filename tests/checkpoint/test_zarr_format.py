"""What is written here without zarr's code is what zarr-python and tensorstore read."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.checkpoint import grid
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 4 KiB, so that small arrays have many; sizes are no part of the format."""
    monkeypatch.setattr(grid, "MIN_FILE_BYTES", 4096)
    monkeypatch.setattr(grid, "MIN_COLUMNS", 4)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def open_with_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec).result().read().result()


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 70), max_size=3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_zarr_and_tensorstore_read_what_was_written(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(grid, "MIN_FILE_BYTES", 4096)
        patch.setattr(grid, "MIN_COLUMNS", 4)
        values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)
        state = CheckpointState(step=1, tables={}, dense={"a": values}, attributes={})
        path = CheckpointDirectory(Path(folder)).save(state).path
        assert np.array_equal(zarr.open(path, mode="r")["dense/a"][...], bits(values))
        if 0 not in shape:  # tensorstore has no arrays without values
            assert np.array_equal(open_with_tensorstore(path / "dense" / "a"), bits(values))


@pytest.mark.usefixtures("small_files")
def test_both_read_single_rows_of_files_with_several_chunks(directory: CheckpointDirectory) -> None:
    values = torch.randn(1000, 50)
    path = directory.save(CheckpointState(step=1, tables={}, dense={"a": values}, attributes={})).path
    array = zarr.open(path, mode="r")["dense/a"]
    assert array.shards is not None
    assert array.shards[1] < 50  # cut along the columns too
    rows = [0, 7, 501, 999]
    assert np.array_equal(array.oindex[rows], values[rows].numpy())
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "dense" / "a")}}
    assert np.array_equal(tensorstore.open(spec).result()[rows].read().result(), values[rows].numpy())


def test_arrays_without_values_open_with_zarr(directory: CheckpointDirectory) -> None:
    dense = {"none": torch.empty(0), "no_rows": torch.empty(0, 3), "no_columns": torch.empty(3, 0)}
    path = directory.save(CheckpointState(step=1, tables={}, dense=dense, attributes={})).path
    for name, tensor in dense.items():
        assert zarr.open(path, mode="r")[f"dense/{name}"].shape == tuple(tensor.shape)

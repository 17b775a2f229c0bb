"""What is saved comes back bit for bit, through mfdist and through plain zarr."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.dtypes import STORED_DTYPES
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import ConfigError
from mfdist.spec import Region

Contents = Callable[[CheckpointState], dict[str, object]]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every dtype from random bytes, so that NaN payloads, −0.0 and subnormals are among them."""
    dtype = getattr(torch, draw(st.sampled_from(sorted(STORED_DTYPES))))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    num_bytes = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.empty(shape, dtype=dtype)
    if data:
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().untyped_storage())[: tensor.nbytes]


names = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=8))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(names.filter(bool).map(lambda parts: "x/" + "/".join(parts) + "/leaf!"), tensors(), max_size=4))
def test_any_tensor_comes_back_bit_for_bit(dense: dict[str, Tensor]) -> None:
    # The oracle shares no code with the checkpoint: torch's own bytes before and after.
    with tempfile.TemporaryDirectory() as path:
        directory = CheckpointDirectory(Path(path))
        state = CheckpointState(step=3, tables={}, dense=dense, attributes={})
        try:
            directory.save(state)
        except ConfigError as error:  # hypothesis finds names such as "x/leaf!" beside "x/leaf!/…"
            assert "must not continue another's" in str(error)
            return
        loaded = directory.load()
        assert list(loaded.dense) == list(dense)
        for name, tensor in dense.items():
            assert loaded.dense[name].dtype == tensor.dtype
            assert loaded.dense[name].shape == tensor.shape
            # tobytes, because == calls NaN unequal and −0.0 equal to 0.0
            assert raw_bytes(loaded.dense[name]) == raw_bytes(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 63, 100])
def test_tables_of_each_dtype_and_size(
    directory: CheckpointDirectory, contents: Contents, dtype: torch.dtype, num_rows: int
) -> None:
    table = TableState(
        weight=torch.randn(num_rows, 7).to(dtype),
        optimizer={"exp_avg": torch.randn(num_rows, 7), "row_sum": torch.randn(num_rows)},
    )
    state = CheckpointState(step=0, tables={"t": table}, dense={}, attributes={})
    directory.save(state)
    assert contents(directory.load()) == contents(state)
    assert directory.verify() == []


def test_a_whole_state_keeps_order_and_attributes(
    directory: CheckpointDirectory, contents: Contents, small_state: Callable[..., CheckpointState]
) -> None:
    state = small_state(step=12)
    directory.save(state)
    loaded = directory.load()
    assert contents(loaded) == contents(state)
    assert list(loaded.tables) == list(state.tables)
    assert list(loaded.dense) == list(state.dense)


def test_a_parameter_that_needs_gradients_is_saved_as_it_is(directory: CheckpointDirectory) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    directory.save(CheckpointState(step=0, tables={"t": TableState(weight=weight)}, dense={}, attributes={}))
    assert directory.load().tables["t"].weight.equal(weight.detach())


@pytest.fixture(scope="module")
def large() -> CheckpointState:
    """An array of three files, the last one partly filled."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((9000, 1024), dtype=np.float32))
    return CheckpointState(step=5, tables={"big": TableState(weight=weight)}, dense={}, attributes={})


def test_an_array_of_several_files_opens_with_plain_zarr(
    directory: CheckpointDirectory, large: CheckpointState
) -> None:
    info = directory.save(large)
    array = zarr.open(info.path, mode="r")["tables/big/weight"]
    oracle = large.tables["big"].weight.numpy()
    assert array.shape == oracle.shape
    assert array.shards is not None
    assert np.array_equal(array[4095:4100], oracle[4095:4100])
    assert np.array_equal(array[:], oracle)
    assert directory.load().tables["big"].weight.numpy().tobytes() == oracle.tobytes()
    # Padding is less than one chunk.
    assert info.num_bytes < oracle.nbytes + (2 << 20) + 10_000


def test_zarr_lists_the_store_without_a_warning(
    directory: CheckpointDirectory, small_state: Callable[..., CheckpointState]
) -> None:
    info = directory.save(small_state())
    root = zarr.open_group(info.path, mode="r")  # warnings are errors here
    assert {name for name, _ in root.members()} == {"tables", "dense", "manifest"}
    arrays = {name for name, member in root.members(max_depth=None) if isinstance(member, zarr.Array)}
    assert arrays == {
        *(f"tables/blocks.0.qkv/{name}" for name in ("weight", "exp_avg", "row_sum")),
        "tables/blocks.1.qkv/weight",
        *(f"dense/{name}" for name in ("model/head.weight", "optimizer/step", "rng/cpu")),
    }
    assert root.attrs["attributes"]["position"] == {"sequence": 7}
    assert root["tables/blocks.0.qkv/weight"].dtype == np.uint16
    assert root["tables/blocks.0.qkv/weight"].attrs["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")],
    ids=["sparse", "meta"],
)
def test_what_cannot_be_stored_is_refused_by_name(directory: CheckpointDirectory, tensor: Tensor) -> None:
    state = CheckpointState(step=0, tables={}, dense={"model/odd": tensor}, attributes={})
    with pytest.raises(ConfigError, match="'model/odd'"):
        directory.save(state)
    assert directory.steps() == []
    assert not directory.path.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_on_a_gpu_goes_there_and_back(directory: CheckpointDirectory, large: CheckpointState) -> None:
    weight = large.tables["big"].weight
    table = TableState(weight=weight.cuda().bfloat16())
    directory.save(CheckpointState(step=0, tables={"big": table}, dense={}, attributes={}))
    loaded = directory.load(device="cuda").tables["big"].weight
    assert loaded.is_cuda
    assert loaded.equal(table.weight)


@pytest.mark.large
def test_a_table_of_more_than_two_to_the_31_elements(directory: CheckpointDirectory) -> None:
    num_rows = (1 << 21) + 8
    weight = torch.zeros(num_rows, 1024, dtype=torch.uint8)
    marks = torch.arange(8 * 1024, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(8, 1024)
    weight[-8:] = marks
    directory.save(CheckpointState(step=1, tables={"t": TableState(weight=weight)}, dense={}, attributes={}))
    end = Region(rows=(num_rows - 8, num_rows), columns=(0, 1024))
    assert directory.load(shards={"t": [end]}).shards["t"][0].weight.equal(marks)
    assert directory.load().tables["t"].weight.equal(weight)
    array = zarr.open(directory.steps()[0].path, mode="r")["tables/t/weight"]
    assert (array[-8:] == marks.numpy()).all()

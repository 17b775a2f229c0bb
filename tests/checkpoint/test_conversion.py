"""Out to other libraries' formats and back, bit for bit; and what they wrote themselves comes in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from mfdist.checkpoint.conversion import FORMATS, export_step, import_step
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState
from mfdist.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # what torch alone says

State = Callable[..., CheckpointState]
Contents = Callable[[CheckpointState], dict[str, object]]


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_comes_back_as_it_was(
    directory: CheckpointDirectory, small_state: State, contents: Contents, tmp_path: Path, form: str
) -> None:
    info = directory.save(small_state(12))
    names = export_step(info.path, tmp_path / "out", form, max_file_bytes=5000)
    assert "tables/blocks.0.qkv/row_sum" in names
    again = CheckpointDirectory(tmp_path / "again")
    assert import_step(tmp_path / "out", again).step == 12
    assert contents(again.load()) == contents(small_state(12))


@pytest.mark.parametrize("form", FORMATS)
def test_an_import_never_replaces_a_step(
    directory: CheckpointDirectory, small_state: State, contents: Contents, tmp_path: Path, form: str
) -> None:
    info = directory.save(small_state(12))
    export_step(info.path, tmp_path / "weights", form, has_states=False)
    with pytest.raises(ConfigError, match=r"step 12 is there already.*; give --step or another folder"):
        import_step(tmp_path / "weights", directory)
    assert contents(directory.load()) == contents(small_state(12))  # states included
    assert import_step(tmp_path / "weights", directory, step=13).step == 13
    assert [info.step for info in directory.steps()] == [12, 13]


def test_other_programs_read_the_exports(directory: CheckpointDirectory, small_state: State, tmp_path: Path) -> None:
    state = small_state(1)
    info = directory.save(state)
    export_step(info.path, tmp_path / "one", "safetensors", has_states=False)
    loaded = load_file(tmp_path / "one" / "model.safetensors")
    weights = {"tables/blocks.0.qkv/weight", "tables/blocks.1.qkv/weight", "dense/model/head.weight"}
    assert loaded.keys() == weights  # no optimiser, no random generator
    assert loaded["tables/blocks.0.qkv/weight"].equal(state.tables["blocks.0.qkv"].weight)

    export_step(info.path, tmp_path / "many", "safetensors", max_file_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "many").iterdir())
    modes = {(tmp_path / "many" / file).stat().st_mode for file in files}
    assert modes == {info.path.joinpath("zarr.json").stat().st_mode}  # whoever may read a checkpoint may read these
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert files[-1] == "model.safetensors.index.json"

    export_step(info.path, tmp_path / "dcp", "dcp")
    target = {"dense/model/head.weight": torch.zeros(8, 3)}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert target["dense/model/head.weight"].equal(state.dense["model/head.weight"])


def test_what_others_wrote_comes_in_with_tables_by_pattern(tmp_path: Path) -> None:
    tensors = {"blocks.0.qkv.weight": torch.randn(6, 4), "head": torch.randn(3, dtype=torch.float64)}
    save_file(tensors, tmp_path / "model.safetensors")
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "dcp", no_dist=True)
    for number, source in enumerate((tmp_path / "model.safetensors", tmp_path / "dcp")):
        directory = CheckpointDirectory(tmp_path / "in")
        info = import_step(source, directory, step=number, tables=["*.qkv.weight"])
        assert (info.step, info.num_tables) == (number, 1)
        state = directory.load(number)
        assert state.tables["blocks.0.qkv"].weight.equal(tensors["blocks.0.qkv.weight"])
        assert state.dense["head"].equal(tensors["head"])


def test_what_cannot_be_converted_is_said(directory: CheckpointDirectory, small_state: State, tmp_path: Path) -> None:
    info = directory.save(small_state(1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConfigError, match="holds something"):
        export_step(info.path, tmp_path / "full", "dcp")
    with pytest.raises(ConfigError, match="--format must be one of safetensors, dcp; got npz"):
        export_step(info.path, tmp_path / "new", "npz")
    with pytest.raises(CheckpointError, match="is none"):
        import_step(tmp_path / "full", CheckpointDirectory(tmp_path / "in"))
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="must be whole"):
        import_step(tmp_path / "bad.safetensors", CheckpointDirectory(tmp_path / "in"))
    save_file({"a": torch.zeros(2)}, tmp_path / "good.safetensors")
    with pytest.raises(ConfigError, match=r"\*\.table fits none of a\."):
        import_step(tmp_path / "good.safetensors", CheckpointDirectory(tmp_path / "in"), tables=["*.table"])


def test_a_damaged_step_is_not_exported(directory: CheckpointDirectory, small_state: State, tmp_path: Path) -> None:
    info = directory.save(small_state(1))
    (info.path / "tables/blocks.0.qkv/weight/c.0.0").unlink()
    for form in FORMATS:
        with pytest.raises(CheckpointError, match="is missing"):
            export_step(info.path, tmp_path / form, form)

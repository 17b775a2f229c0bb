"""Saved by any number of ranks under any plan, a table is the same bytes; loaded under any other, the same bits."""

from pathlib import Path

import pytest
import torch
import zarr

from mfdist.checkpoint import grid
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableShard, TableState
from mfdist.checkpoint.step_info import StepInfo
from mfdist.errors import CheckpointError, ConfigError, UnavailableError
from mfdist.spec import Region
from tests.checkpoint import divided
from tests.checkpoint.divided import KINDS, assert_holds, files_of, regions, save_in_threads, state_of_rank

TABLES = divided.whole_arrays()
WORLD_SIZES = (1, 2, 3, 4, 8)


@pytest.fixture(autouse=True, scope="module")
def _small_files() -> None:
    """Files of 2 KiB, so that every table has many, and cuts meet none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "MIN_FILE_BYTES", 2048)
        patch.setattr(grid, "MIN_COLUMNS", 4)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """A directory for every kind and number of ranks that saved."""
    paths = {}
    for kind in KINDS:
        for world_size in WORLD_SIZES:
            path = tmp_path_factory.mktemp(f"{kind}{world_size}")
            held = regions(kind, world_size, TABLES)
            infos = save_in_threads(path, [state_of_rank(TABLES, mine) for mine in held])
            assert all(isinstance(info, StepInfo) for info in infos), infos
            assert len(set(infos)) == 1
            paths[kind, world_size] = path
    return paths


def test_the_bytes_on_disk_depend_on_nobody(saved: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    tables = {
        name: TableState(weight=arrays["weight"], optimizer={k: v for k, v in arrays.items() if k != "weight"})
        for name, arrays in TABLES.items()
    }
    dense = state_of_rank(TABLES, {}).dense
    whole = directory.save(CheckpointState(step=1, tables=tables, dense=dense, attributes={"step": 1}))
    expected = files_of(whole.path)
    assert len(expected) > 100
    for path in saved.values():
        assert files_of(path / whole.path.name) == expected
        assert {entry.name for entry in path.iterdir()} == {whole.path.name, ".writer.lock"}


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize(
    ("num_before", "num_after"), [(1, 2), (2, 1), (3, 4), (4, 3), (1, 8), (8, 1)], ids=lambda num: str(num)
)
def test_any_plan_loads_what_any_other_saved(
    saved: dict[tuple[str, int], Path], before: str, num_before: int, after: str, num_after: int
) -> None:
    for mine in regions(after, num_after, TABLES):
        loaded = CheckpointDirectory(saved[before, num_before]).load(shards=mine)
        assert_holds(loaded, TABLES, mine)
        assert loaded.dense["model/bias"].equal(torch.arange(5.0))
        assert loaded.attributes == {"step": 1}


def test_a_sharded_save_verifies_and_opens_with_zarr(saved: dict[tuple[str, int], Path]) -> None:
    path = saved["grid", 8]
    assert CheckpointDirectory(path).verify() == []
    weight = zarr.open(path / "step-000000001", mode="r")["tables/adam.fp32.wide/weight"]
    assert (weight[...] == TABLES["adam.fp32.wide"]["weight"].numpy()).all()


def test_a_rank_reads_only_the_files_it_needs(saved: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(saved["row", 4], tmp_path / "copy")
    name = "adam.fp32.tall"
    region = Region(rows=(0, 20), columns=(0, 20))
    needed = {f"tables/{name}/{array}/{file}" for array in TABLES[name] for file, _ in
              grid.cut(tuple(TABLES[name][array].shape), 4).files_in(region)}  # fmt: skip
    root = tmp_path / "copy" / "step-000000001"
    for file in root.rglob("c.*"):
        relative = file.relative_to(root).as_posix()
        if relative not in needed and not relative.startswith("dense"):
            file.unlink()
    loaded = CheckpointDirectory(tmp_path / "copy").load(shards={name: [region]})
    assert_holds(loaded, TABLES, {name: [region]})
    with pytest.raises(CheckpointError, match="is missing"):
        CheckpointDirectory(tmp_path / "copy").load(shards={name: [Region(rows=(0, 151), columns=(0, 20))]})


def test_tables_can_be_loaded_by_name(saved: dict[tuple[str, int], Path]) -> None:
    directory = CheckpointDirectory(saved["table", 3])
    loaded = directory.load(tables=["sgd.bf16.wide", "adam.fp32.tall"])
    assert set(loaded.tables) == {"sgd.bf16.wide", "adam.fp32.tall"}
    assert loaded.tables["adam.fp32.tall"].optimizer["exp_avg"].equal(TABLES["adam.fp32.tall"]["exp_avg"])
    with pytest.raises(CheckpointError, match=r"has no nothing\.here; it has sgd\.fp32\.tall"):
        directory.load(tables=["nothing.here"])


def test_loading_in_place_fills_any_tensor_and_says_what_does_not_fit(saved: dict[tuple[str, int], Path]) -> None:
    directory = CheckpointDirectory(saved["column", 2])
    names = ["sgd.fp32.wide", "adam.bf16.tall"]
    held = regions("grid", 4, {name: TABLES[name] for name in names})[1]
    target = state_of_rank({k: {a: torch.zeros_like(t) for a, t in TABLES[k].items()} for k in names}, held)
    with pytest.raises(CheckpointError, match=r"lacks nothing, and holds table 'sgd\.fp32\.tall' weight, .* more"):
        directory.load_into(target)
    assert not any(shard.weight.any() for shards in target.shards.values() for shard in shards)
    loaded = directory.load_into(target, allow_unused=True)
    assert_holds(loaded, TABLES, held)
    assert all(loaded.shards[name][0].weight is target.shards[name][0].weight for name in held)

    more = CheckpointState(
        step=0, tables={"extra": TableState(weight=torch.zeros(2, 2))}, dense=target.dense, attributes={}
    )
    with pytest.raises(CheckpointError, match="lacks table 'extra' weight, and"):
        directory.load_into(more, allow_unused=True)
    other = TableState(weight=torch.zeros(40, 96, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"\[40, 96\] bfloat16, in .* \[40, 96\] float32"):
        directory.load_into(
            CheckpointState(step=0, tables={"sgd.fp32.wide": other}, dense={}, attributes={}), allow_unused=True
        )


def test_a_strided_target_is_filled(saved: dict[tuple[str, int], Path]) -> None:
    directory = CheckpointDirectory(saved["row", 2])
    wide = torch.zeros(96, 40).t()
    target = CheckpointState(step=0, tables={"sgd.fp32.wide": TableState(weight=wide)}, dense={}, attributes={})
    directory.load_into(target, allow_unused=True)
    assert wide.equal(TABLES["sgd.fp32.wide"]["weight"])


def test_a_hole_is_refused_on_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    held = regions("row", 3, TABLES)
    del held[1]["sgd.fp32.tall"]
    answers = save_in_threads(tmp_path / "c", [state_of_rank(TABLES, mine) for mine in held])
    assert all(isinstance(answer, ConfigError) for answer in answers)
    assert all("nobody holds rows 51 to 101" in str(answer) for answer in answers)
    assert {entry.name for entry in (tmp_path / "c").iterdir()} == {".writer.lock"}


def test_what_ranks_disagree_on_is_said(tmp_path: Path) -> None:
    def shard(rows: tuple[int, int], dtype: torch.dtype) -> CheckpointState:
        size = rows[1] - rows[0]
        part = TableShard(
            num_rows=8, row_dim=2, region=Region(rows=rows, columns=(0, 2)), weight=torch.ones(size, 2, dtype=dtype)
        )
        return CheckpointState(step=1, tables={}, dense={}, attributes={}, shards={"t": [part]})

    answers = save_in_threads(tmp_path / "a", [shard((0, 4), torch.float32), shard((4, 8), torch.bfloat16)])
    assert all("is [8, 2] float32 and, on rank 1, [8, 2] bfloat16" in str(answer) for answer in answers)
    steps = [CheckpointState(step=step, tables={}, dense={}, attributes={}) for step in (1, 2)]
    answers = save_in_threads(tmp_path / "b", steps)
    assert all("rank 0 saves 1, rank 1 2" in str(answer) for answer in answers)


def test_a_failing_rank_is_named_to_all_and_earlier_steps_stay(tmp_path: Path) -> None:
    held = regions("column", 2, TABLES)
    states = [state_of_rank(TABLES, mine) for mine in held]
    assert all(isinstance(info, StepInfo) for info in save_in_threads(tmp_path / "c", states))
    odd = CheckpointState(
        step=2, tables={}, dense={"odd": torch.zeros(2, device="meta")}, attributes={}, shards=states[1].shards
    )
    answers = save_in_threads(tmp_path / "c", [state_of_rank(TABLES, held[0], step=2), odd])
    assert all(isinstance(answer, ConfigError) and "'odd'" in str(answer) for answer in answers)
    assert str(answers[0]).startswith("rank 1: ")
    assert [info.step for info in CheckpointDirectory(tmp_path / "c").steps()] == [1]


def test_a_second_job_is_refused_on_all_its_ranks(tmp_path: Path) -> None:
    states = [state_of_rank(TABLES, mine) for mine in regions("row", 2, TABLES)]
    with CheckpointDirectory(tmp_path / "c").writer_lock():
        answers = save_in_threads(tmp_path / "c", states)
    assert all(isinstance(answer, UnavailableError) and "is writing to it" in str(answer) for answer in answers)

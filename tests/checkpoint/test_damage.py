"""A flipped bit or a missing file anywhere is found by verify and by load, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.manifest import MANIFEST, Manifest
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import CheckpointError

State = Callable[..., CheckpointState]

FILES = {
    "manifest": MANIFEST,
    "root group": "zarr.json",
    "inner group": "tables/zarr.json",
    "array": "tables/blocks.0.qkv/weight/zarr.json",
    "table rows": "tables/blocks.0.qkv/weight/c.0.0",
    "optimiser state": "tables/blocks.0.qkv/row_sum/c.0",
    "dense tensor": "dense/model/head.weight/c.0.0",
    "number": "dense/optimizer/step/c",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, small_state: State) -> Path:
    directory = CheckpointDirectory(tmp_path_factory.mktemp("saved"))
    for step in (1, 2):
        directory.save(small_state(step))
    return directory.path


@pytest.fixture
def step(directory: CheckpointDirectory, saved: Path) -> Path:
    """Step 2 of two, in a copy of its own to damage."""
    shutil.copytree(saved, directory.path)
    return directory.path / "step-000000002"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def assert_found(directory: CheckpointDirectory, file: str) -> str:
    damages = directory.verify()
    assert [damage.file for damage in damages] == [file]
    with pytest.raises(CheckpointError) as caught:
        directory.load()
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    assert directory.load(1).step == 1  # the other step is untouched
    assert directory.verify(1) == []
    return str(damages[0])


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
@pytest.mark.parametrize("where", [0.0, 0.37, 0.71, 1.0])
def test_a_flipped_bit_is_found_and_named(directory: CheckpointDirectory, step: Path, file: str, where: float) -> None:
    num_bits = (step / file).stat().st_size * 8
    flip(step / file, int(where * (num_bits - 1)))
    assert_found(directory, file)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_a_missing_file_is_found_and_named(directory: CheckpointDirectory, step: Path, file: str) -> None:
    (step / file).unlink()
    assert_found(directory, file)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_a_truncated_file_is_found_and_named(directory: CheckpointDirectory, step: Path, file: str) -> None:
    (step / file).write_bytes((step / file).read_bytes()[:-1])
    assert_found(directory, file)


def test_no_bit_of_a_manifest_can_flip_unseen(directory: CheckpointDirectory, step: Path) -> None:
    path = step / MANIFEST
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(whole) * 8, size=150, replace=False):
        flip(path, int(bit))
        with pytest.raises(CheckpointError):
            Manifest.read(step)
        path.write_bytes(whole)
    Manifest.read(step)


def test_the_rows_of_a_damaged_file_are_named(directory: CheckpointDirectory) -> None:
    weight = torch.zeros(9000, 1024)  # four blocks of columns, of 2048 rows each
    path = directory.save(
        CheckpointState(step=5, tables={"big": TableState(weight=weight)}, dense={}, attributes={})
    ).path
    flip(path / "tables/big/weight/c.1.1", 12345)
    [damage] = directory.verify()
    assert (damage.table, damage.array, damage.rows) == ("big", "weight", (2048, 4096))
    assert damage.columns == (256, 512)
    assert "weight rows 2048 to 4095 columns 256 to 511: tables/big/weight/c.1.1 has crc32c" in str(damage)
    with pytest.raises(CheckpointError, match="table 'big' weight rows 2048 to 4095"):
        directory.load()


def test_a_file_of_another_step_in_place_of_ours_is_found(directory: CheckpointDirectory, small_state: State) -> None:
    first, second = (directory.save(small_state(step, seed=step)).path for step in (1, 2))
    file = FILES["table rows"]
    shutil.copy(first / file, second / file)  # whole in itself, but not ours
    assert_found(directory, file)


def test_all_damages_are_listed_not_only_the_first(directory: CheckpointDirectory, step: Path) -> None:
    broken = [FILES["array"], FILES["table rows"], FILES["dense tensor"]]
    for file in broken:
        flip(step / file, 3)
    assert {damage.file for damage in directory.verify()} == set(broken)


def test_a_half_copied_step_is_found(directory: CheckpointDirectory, step: Path, tmp_path: Path) -> None:
    copy = CheckpointDirectory(tmp_path / "copy")
    shutil.copytree(step, copy.path / step.name, ignore=shutil.ignore_patterns("c.*"))
    assert {damage.problem for damage in copy.verify()} == {"is missing"}
    with pytest.raises(CheckpointError, match="is missing"):
        copy.load()


def test_a_step_under_another_name_is_refused(directory: CheckpointDirectory, step: Path) -> None:
    step.rename(step.with_name("step-000000009"))
    with pytest.raises(CheckpointError, match="holds step 2; rename it back"):
        directory.load(9)
    assert len(directory.verify(9)) == 1


def test_a_step_without_a_manifest_is_listed_as_damaged(directory: CheckpointDirectory, step: Path) -> None:
    (step / MANIFEST).unlink()
    first, second = directory.steps()
    assert first.damage is None
    assert second.damage is not None
    assert "manifest" in second.damage


def test_progress_ends_at_the_whole(directory: CheckpointDirectory, step: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert directory.verify(on_progress=lambda done, total: seen.append((done, total))) == []
    total = directory.steps()[-1].num_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_newer_format_is_refused_by_version(directory: CheckpointDirectory, step: Path) -> None:
    # A whole manifest of a later format, made as docs/reference/checkpoint-layout.md says.
    from google_crc32c import value

    document = json.loads((step / MANIFEST).read_bytes())
    body = {**document["attributes"], "format_version": 3}
    del body["crc32c"]
    body["crc32c"] = f"{value(json.dumps(body, indent=1, sort_keys=True).encode()):08x}"
    (step / MANIFEST).write_text(json.dumps({**document, "attributes": body}))
    with pytest.raises(CheckpointError, match=r"reads checkpoint formats up to 2;.*has format 3; use the mfdist"):
        directory.load()
    assert len(directory.verify()) == 1

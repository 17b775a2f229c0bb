"""Hugging Face datasets, from local folders: no network is needed."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfdist.errors import DataError
from mfdist.training.data.documents import Document, Source, open_source

datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")

# What the library and those it brings warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    yield
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "dataset"
    path.mkdir()
    for split, texts in {"train": ["one", "", "three", None], "test": ["held"]}.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


def read(source: Source) -> tuple[list[Document], list[str]]:
    skipped: list[str] = []
    return list(source.documents(on_skip=skipped.append)), skipped


def test_a_local_folder_is_streamed(folder: Path) -> None:
    found, skipped = read(open_source(f"hf:{folder}", text_field="body"))
    assert found == [Document("train:0", "one"), Document("train:2", "three")]
    assert len(skipped) == 1
    assert "record 3: field 'body' must hold text; got NoneType" in skipped[0]


def test_configuration_and_split_may_be_given(folder: Path) -> None:
    source = f"hf:{os.path.relpath(folder)}"
    assert read(open_source(f"{source}:default:test", text_field="body"))[0] == [Document("test:0", "held")]
    assert read(open_source(f"{source}::test", text_field="body"))[0] == [Document("test:0", "held")]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert [document.text for document in read(open_source(f"hf:{tmp_path / 'one'}"))[0]] == ["a", "b"]
    assert [document.text for document in read(open_source(f"hf:{tmp_path / 'two'}::dev"))[0]] == ["b"]


def test_a_shuffle_keeps_the_names_of_records(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [str(number) for number in range(2500)]}).save_to_disk(str(tmp_path / "saved"))
    source = open_source(f"hf:{tmp_path / 'saved'}")
    shuffled = list(source.documents(on_skip=pytest.fail, shuffle_seed=3))
    assert shuffled == list(source.documents(on_skip=pytest.fail, shuffle_seed=3))
    assert shuffled[:5] != read(source)[0][:5]
    assert {(document.name, document.text) for document in shuffled} == {(f"train:{n}", str(n)) for n in range(2500)}


def test_the_identity_follows_the_files(folder: Path) -> None:
    first = open_source(f"hf:{folder}").identity
    assert open_source(f"hf:{folder}").identity == first
    (folder / "train.jsonl").write_text('{"body": "other"}\n')
    assert open_source(f"hf:{folder}").identity != first
    assert open_source(f"hf:{folder}::test").identity != open_source(f"hf:{folder}").identity


def test_a_wrong_field_names_the_fields(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none in hf:.*no field 'text'; fields are body; set data\.text_field"):
        read(open_source(f"hf:{folder}"))


def test_what_does_not_load_is_one_line_that_names_it(folder: Path) -> None:
    for source in (f"hf:{folder}::nosplit", "hf:nobody/nothing-of-this-name"):
        with pytest.raises(DataError, match=r"must load; hf:.*hf:NAME:CONFIG:SPLIT") as error:
            read(open_source(source))
        assert "\n" not in str(error.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does for a module it cannot find
    with pytest.raises(DataError, match=r"needs the package datasets.*pip install 'mfdist\[hf\]'"):
        read(open_source("hf:any"))


def test_the_field_is_part_of_the_identity() -> None:
    """Another column of the same dataset is another text, and must not be found in the cache."""
    first, second = (open_source("hf:nowhere", text_field=field).identity for field in ("text", "code"))
    assert first != second

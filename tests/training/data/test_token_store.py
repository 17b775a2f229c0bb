"""The token store: every document once, whole, followed by its end; the same for the same text; never half-made."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mfdist.config import DataConfig
from mfdist.errors import DataError
from mfdist.training.data import documents
from mfdist.training.data.split import is_held_out
from mfdist.training.data.token_store import open_tokens, prepare_tokens
from mfdist.training.data.tokenizer import train_bpe
from mfdist.training.events import Event, Preparing, Warned, ignore

TEXTS = {
    f"{number:02}.txt": f"document {number}\n" + "Größe 漢字 🙂 and words. " * (number % 7 + 1) for number in range(60)
}

PREPARE = """
import os, signal, sys
from mfdist.config import DataConfig
from mfdist.training.data.token_store import prepare_tokens
def observe(event):
    if sys.argv[3] == "die" and "tokenising" in event.activity:
        os.kill(os.getpid(), signal.SIGKILL)
config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], tokenizer="bpe", vocab_size=300)
print(prepare_tokens(config, observer=observe).fingerprint)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.mkdir()
    for name, text in TEXTS.items():
        (path / name).write_text(text)
    return path


def config_of(folder: Path, tokenizer: str = "bytes", **changes: object) -> DataConfig:
    values = {"source": str(folder), "tokenizer": tokenizer, "vocab_size": 300, "cache_dir": folder.parent / "cache"}
    return DataConfig.model_validate({**values, "validation_fraction": 0.1, **changes})


def tokens_folder(config: DataConfig) -> list[str]:
    assert config.cache_dir is not None
    return [path.name for path in (config.cache_dir / "tokens").iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_on_its_side_followed_by_its_end(folder: Path, tokenizer: str) -> None:
    store = prepare_tokens(config_of(folder, tokenizer), observer=ignore)
    for tokens, is_validation in ((store.train, False), (store.validation, True)):
        expected = [text for name, text in TEXTS.items() if is_held_out(name, 0, 0.1) == is_validation]
        ends = np.flatnonzero(tokens == store.tokenizer.end_of_document)
        found = [store.tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends[:-1] + 1)]
        assert found == expected
        assert tokens.dtype == np.uint16
        assert not tokens.flags.writeable
    held = [text for name, text in TEXTS.items() if is_held_out(name, 0, 0.1)]
    assert store.validation_num_bytes == sum(len(text.encode()) for text in held)


def test_text_is_tokenised_once(folder: Path) -> None:
    events: list[Event] = []
    first = prepare_tokens(config_of(folder), observer=events.append)
    sizes = sum(len(text.encode()) for text in TEXTS.values())
    assert events[-1] == Preparing(activity="tokenising", done=sizes, total=sizes, unit="bytes")
    again = prepare_tokens(config_of(folder), observer=pytest.fail)
    assert again.directory == first.directory
    assert again.fingerprint == first.fingerprint


def test_the_tokenizers_training_is_told_of_with_its_merges_at_the_end(folder: Path) -> None:
    events: list[Event] = []
    store = prepare_tokens(config_of(folder, "bpe"), observer=events.append)
    told = [event for event in events if isinstance(event, Preparing) and event.activity == "training the tokenizer"]
    merges = store.tokenizer.vocab_size - 257
    assert merges > 0 and [(event.done, event.total) for event in told] == [(0, None), (merges, merges)]


@pytest.mark.parametrize("change", ["time", "new file", "seed", "tokenizer", "vocabulary", "fraction", "field"])
def test_what_changes_the_tokens_makes_another_store(folder: Path, change: str) -> None:
    config = config_of(folder, "bpe")
    first = prepare_tokens(config, observer=ignore).directory
    if change == "time":
        os.utime(folder / "00.txt", ns=(1, 1))
    elif change == "new file":
        (folder / "new.txt").write_text("new")
    changes: dict[str, object] = {
        "seed": {"seed": 1},
        "tokenizer": {"tokenizer": "bytes"},
        "vocabulary": {"vocab_size": 290},
        "fraction": {"validation_fraction": 0.3},
        "field": {"text_field": "body"},
    }
    other = config_of(folder, **{"tokenizer": "bpe", **changes.get(change, {})})  # type: ignore[dict-item]
    assert prepare_tokens(other, observer=ignore).directory != first
    assert len(tokens_folder(config)) == 2


def test_the_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = prepare_tokens(config_of(folder), observer=ignore)
    os.utime(folder / "00.txt", ns=(1, 1))
    same = prepare_tokens(config_of(folder), observer=ignore)
    assert (same.directory, same.fingerprint) != (first.directory, first.fingerprint)
    assert same.fingerprint == first.fingerprint
    (folder / "00.txt").write_text("other")
    assert prepare_tokens(config_of(folder), observer=ignore).fingerprint != first.fingerprint


def test_a_tokenizer_file_is_used_and_its_content_is_part_of_the_key(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_bpe(iter(["abc " * 100]), 260).save(path)
    first = prepare_tokens(config_of(folder, str(path)), observer=ignore)
    assert first.tokenizer.vocab_size <= 260
    train_bpe(iter(["xyz " * 100]), 265).save(path)
    assert prepare_tokens(config_of(folder, str(path)), observer=ignore).directory != first.directory
    with pytest.raises(
        DataError, match=r"data.tokenizer must be bytes, bpe or the path of a tokenizer.json; .*nowhere"
    ):
        prepare_tokens(config_of(folder, "nowhere"), observer=ignore)


def test_a_large_vocabulary_takes_four_bytes(folder: Path, tmp_path: Path) -> None:
    train_bpe(iter([]), 257).save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"never{number}": number for number in range(257, 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    store = prepare_tokens(config_of(folder, str(tmp_path / "tokenizer.json")), observer=ignore)
    assert store.train.dtype == np.uint32
    assert store.tokenizer.decode(store.train[: len(TEXTS["00.txt"])].tolist()).startswith("document ")


def test_a_document_in_pieces_has_one_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 50)
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "text" / name).write_text("word " * 100)
    store = prepare_tokens(config_of(tmp_path / "text"), observer=ignore)
    both = np.concatenate([store.train, store.validation])
    assert np.count_nonzero(both == store.tokenizer.end_of_document) == 3
    assert store.tokenizer.decode(both.tolist()) == "word " * 300


def test_what_is_left_out_is_warned_of_a_few_times(folder: Path) -> None:
    for number in range(50):
        (folder / f"junk{number}.txt").write_bytes(b"\0")
    events: list[Event] = []
    prepare_tokens(config_of(folder), observer=events.append)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == 21
    assert "junk0.txt" in warnings[0]
    assert warnings[-1] == "30 more remarks of this kind are not shown"


def test_a_single_document_is_split_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("chapter " * 1000)
    events: list[Event] = []
    store = prepare_tokens(config_of(tmp_path / "book.txt"), observer=events.append)
    assert len(store.validation) == 800
    assert [event for event in events if isinstance(event, Warned) and "the end of the text, 10.0%" in event.message]


@pytest.mark.parametrize(("text", "message"), [("", "nothing usable"), ("ab", "at least 4 tokens; got 3")])
def test_too_little_text_leaves_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    config = config_of(tmp_path / "a.txt")
    with pytest.raises(DataError, match=message):
        prepare_tokens(config, observer=ignore)
    assert tokens_folder(config) == []


def test_processes_at_once_and_killed_ones_give_one_whole_store(folder: Path) -> None:
    cache = folder.parent / "cache"

    def start(action: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", PREPARE, str(folder), str(cache), action]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    killed = start("die")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    started = [start("go"), start("go")]
    fingerprints = {process.communicate(timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    config = config_of(folder, "bpe", validation_fraction=0.02)
    assert len(tokens_folder(config)) == 1
    assert fingerprints == {prepare_tokens(config, observer=ignore).fingerprint}
    fresh = config_of(folder, "bpe", validation_fraction=0.02, cache_dir=folder.parent / "other")
    assert fingerprints == {prepare_tokens(fresh, observer=ignore).fingerprint}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "store.json").unlink(), "No such file"),
        (lambda path: (path / "store.json").write_text("{}"), "format"),
        (lambda path: (path / "store.json").write_text('{"format": 99}'), "its format is 99, not 1"),
        (lambda path: (path / "train.bin").write_bytes(b"xx"), "train.bin has 2 bytes, not"),
        (lambda path: (path / "validation.bin").unlink(), "validation.bin: No such file"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "must be a tokenizer.json"),
    ],
)
def test_a_damaged_store_is_named_with_the_remedy(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    store = prepare_tokens(config_of(folder), observer=ignore)
    damage(store.directory)
    with pytest.raises(
        DataError, match=f"token store .* must be whole: .*{message}.*; remove it, and it is made anew"
    ) as error:
        open_tokens(store.directory)
    assert str(store.directory) in str(error.value)

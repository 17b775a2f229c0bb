"""The split by document: stable, never empty on a side, nothing lost."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import DataError
from mfdist.training.data import split
from mfdist.training.data.split import SplitWriter, is_held_out

Sides = tuple[list[int], list[int], list[str]]


def written(folder: Path, documents: list[tuple[str, list[int]]], *, seed: int = 0, fraction: float = 0.1) -> Sides:
    train, validation = folder / "train", folder / "validation"
    dtype = np.dtype("<u2")
    with SplitWriter(train, validation, dtype, seed=seed, fraction=fraction) as writer:
        for name, tokens in documents:
            writer.append(name, tokens)
        remarks = writer.finish()
    return np.fromfile(train, dtype).tolist(), np.fromfile(validation, dtype).tolist(), remarks


def test_documents_are_held_out_in_the_asked_share_and_by_name_alone() -> None:
    names = [f"folder/{number}.txt" for number in range(5000)]
    held = {name for name in names if is_held_out(name, 0, 0.1)}
    assert 400 < len(held) < 600
    other = {name for name in names if is_held_out(name, 1, 0.1)}
    assert len(held & other) < 100
    assert held < {name for name in names if is_held_out(name, 0, 0.2)}


def test_documents_stay_on_their_side_when_others_come(tmp_path: Path) -> None:
    documents = [(f"{number}.txt", [number, number, number]) for number in range(100)]
    _, few, _ = written(tmp_path, documents[::2])
    train, many, remarks = written(tmp_path, documents)
    assert 0 < len(few) < len(many)
    assert set(few) < set(many)
    assert not set(train) & set(many)
    assert remarks == []


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    fraction=st.sampled_from([0.02, 0.1, 0.3, 0.49]),
    copy_bytes=st.sampled_from([2, 6, 2**20]),
)
def test_no_token_is_lost_and_no_side_is_empty(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int, fraction: float, copy_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    documents = [(f"{number}.txt", [number] * length) for number, length in enumerate(lengths)]
    expected = sorted(token for _, tokens in documents for token in tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_COPY_BYTES", copy_bytes)
        if len(expected) < 4:
            with pytest.raises(DataError, match=f"at least 4 tokens; got {len(expected)}"):
                written(folder, documents, seed=seed, fraction=fraction)
            return
        train, validation, remarks = written(folder, documents, seed=seed, fraction=fraction)
    assert min(len(train), len(validation)) >= 2 or min(lengths) == 1
    assert len(train) + len(validation) in (len(expected), len(expected) - 1)
    if min(lengths) > 1:
        assert sorted(train + validation) == expected
        is_split = bool(set(train) & set(validation))
        assert not is_split or ("the end of the text" in remarks[0] and train == sorted(train))


def test_the_only_document_gives_its_end(tmp_path: Path) -> None:
    train, validation, remarks = written(tmp_path, [("a", list(range(100)))])
    assert (train, validation) == (list(range(90)), list(range(90, 100)))
    assert "held out instead: the end of the text, 10.0% of the tokens" in remarks[0]


def test_of_few_documents_a_whole_one_is_held_out(tmp_path: Path) -> None:
    documents = [(f"part{number}.txt", [number] * 5) for number in range(4)]
    assert not any(is_held_out(name, 0, 0.02) for name, _ in documents)
    train, validation, remarks = written(tmp_path, documents, fraction=0.02)
    assert len(set(validation)) == 1
    assert len(validation) == 5
    assert not set(train) & set(validation)
    assert "the document of the lowest draw, 25.0% of the tokens" in remarks[0]


def test_pieces_of_a_document_stay_together(tmp_path: Path) -> None:
    documents = [(f"{number}.txt", [number] * 3) for number in range(60) for _ in range(3)]
    train, validation, _ = written(tmp_path, documents)
    assert validation
    assert not set(train) & set(validation)


def test_a_lopsided_split_is_remarked_on(tmp_path: Path) -> None:
    held = next(name for name in map(str, range(1000)) if is_held_out(name, 0, 0.1))
    kept = next(name for name in map(str, range(1000)) if not is_held_out(name, 0, 0.1))
    _, _, remarks = written(tmp_path, [(held, [1] * 90), (kept, [2] * 10)])
    assert remarks == ["the held-out documents are 90% of the text; another data.seed splits it otherwise"]

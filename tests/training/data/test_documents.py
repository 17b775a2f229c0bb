"""Cutting documents into pieces, and finding the source a configuration names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import DataError
from mfdist.training.data.documents import (
    MAX_PIECE_CHARS,
    Document,
    iter_documents,
    open_source,
    pieces,
    record_text,
    text_pieces,
)


def fail_on_skip(message: str) -> None:
    raise AssertionError(f"skipped: {message}")


@given(st.lists(st.text(max_size=20), max_size=10))
def test_pieces_of_a_short_document_are_the_document(blocks: list[str]) -> None:
    found = list(pieces("a", iter(blocks)))
    assert found == ([Document("a", "".join(blocks))] if "".join(blocks) else [])


@pytest.mark.parametrize(
    "text",
    ["word " * 700_000, "x" * (3 * MAX_PIECE_CHARS), "é\n" * (MAX_PIECE_CHARS + 1), "a" * MAX_PIECE_CHARS, " " * 2**21],
    ids=["words", "no space", "lines", "exactly one", "only spaces"],
)
def test_a_long_document_is_cut_into_pieces_that_join_again(text: str) -> None:
    found = list(text_pieces("a", text))
    assert "".join(piece.text for piece in found) == text
    assert all(0 < len(piece.text) <= MAX_PIECE_CHARS for piece in found)
    assert [piece.is_end for piece in found] == [False] * (len(found) - 1) + [True]


def test_a_piece_ends_before_white_space() -> None:
    found = list(text_pieces("a", "seven12 " * 400_000))
    assert len(found) == 4
    assert all(piece.text.startswith(" ") and not piece.text[-1].isspace() for piece in found[1:-1])


def test_what_came_before_an_error_is_a_whole_document() -> None:
    def blocks() -> Iterator[str]:
        yield "x" * MAX_PIECE_CHARS
        yield "y"
        raise DataError("the rest is bad")

    found = []
    with pytest.raises(DataError, match="the rest is bad"):
        found.extend(pieces("a", blocks()))
        pytest.fail("the error was swallowed")
    stream = pieces("a", blocks())
    assert next(stream).is_end is False
    assert next(stream) == Document("a", "y", is_end=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "must be an object with a field 'text'; got list"),
        ({"body": "x", "id": 1}, "no field 'text'; fields are body, id; set data.text_field"),
        ({"text": 3}, "must hold text; got int"),
        ({"text": None}, "must hold text; got NoneType"),
        ({"text": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_record_without_text_says_what_is_wrong(record: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        record_text(record, "text")


def test_the_python_stdlib_is_megabytes_of_text_in_a_fixed_order() -> None:
    source = open_source("python-stdlib")
    names, num_chars = [], 0
    for document in source.documents(on_skip=fail_on_skip):
        names.append(document.name)
        num_chars += len(document.text)
    assert 5e6 < num_chars < 15e6
    assert names[0].startswith("topics/")
    assert "asyncio/base_events.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert names == [document.name for document in iter_documents("python-stdlib", on_skip=fail_on_skip)]
    assert source.position_bytes == source.num_bytes
    assert source.identity == open_source("python-stdlib").identity


def test_a_shuffled_source_gives_the_same_documents_in_another_order(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    source = open_source(str(tmp_path))
    in_order = list(source.documents(on_skip=fail_on_skip))
    shuffled = list(source.documents(on_skip=fail_on_skip, shuffle_seed=1))
    assert shuffled == list(source.documents(on_skip=fail_on_skip, shuffle_seed=1))
    assert shuffled != in_order
    assert sorted(shuffled, key=lambda document: document.name) == in_order


@pytest.mark.parametrize("source", ["no/such/folder", "pyhton-stdlib", "hf:"])
def test_a_source_that_is_not_there_is_named_with_what_may_be_given(source: str) -> None:
    with pytest.raises(DataError, match=rf"data.source must be .*{source}"):
        list(iter_documents(source, on_skip=fail_on_skip))

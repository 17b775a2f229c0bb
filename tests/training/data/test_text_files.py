"""Text from real files: every format and compression, and everything that is wrong with files."""

import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mfdist.errors import DataError
from mfdist.training.data.documents import MAX_PIECE_CHARS, Document, open_source
from mfdist.training.data.file_text import BLOCK_BYTES
from mfdist.training.data.text_files import MAX_LINE_BYTES, TextFiles

TEXT = "Grüße aus 東京 🙂\r\nline two\n"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(source: Path, *, text_field: str = "text") -> tuple[list[Document], list[str]]:
    skipped: list[str] = []
    found = list(TextFiles(str(source), text_field=text_field).documents(on_skip=skipped.append))
    return found, skipped


def parquet_bytes(rows: list[dict[str, object]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("compression", list(COMPRESS))
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str, compression: str) -> None:
    (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESS[compression](TEXT.encode()))
    assert read(tmp_path) == ([Document(f"a{suffix}{compression}", TEXT)], [])


@pytest.mark.parametrize("compression", list(COMPRESS))
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_records_is_a_document_a_record(tmp_path: Path, suffix: str, compression: str) -> None:
    rows: list[dict[str, object]] = [{"text": TEXT, "id": 0}, {"text": "", "id": 1}, {"text": "two", "id": 2}]
    lines = "\n\n".join(json.dumps(row) for row in rows).encode()
    content = lines if suffix == ".jsonl" else parquet_bytes(rows)
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    found, skipped = read(tmp_path)
    numbers = (1, 5) if suffix == ".jsonl" else (1, 3)  # lines are counted as an editor does, blank ones too
    assert found == [Document(f"{path.name}:{numbers[0]}", TEXT), Document(f"{path.name}:{numbers[1]}", "two")]
    assert skipped == []


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a/z.md",
        "a.txt",
        "a/b/c.py",
        "image.png",
        "A.TXT",
        ".hidden.txt",
        ".git/x.txt",
        "empty.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    found, skipped = read(tmp_path)
    assert [document.name for document in found] == ["A.TXT", "a.txt", "a/b/c.py", "a/z.md", "b.txt"]
    assert skipped == []


def test_a_single_file_of_another_suffix_is_text(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text(TEXT, newline="")
    assert read(tmp_path / "notes.log") == ([Document("notes.log", TEXT)], [])


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path)[0] == [Document("a.txt", "hello")]


def test_characters_across_blocks_are_whole(tmp_path: Path) -> None:
    text = "x" * (BLOCK_BYTES - 1) + "🙂" * 10
    (tmp_path / "a.txt").write_text(text)
    assert "".join(document.text for document in read(tmp_path)[0]) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nul.txt", b"abc\0def", "nul.txt must be text; got a NUL byte at offset 3; it is left out"),
        ("latin.txt", "né".encode("latin-1"), "latin.txt must be UTF-8 text; got 0xe9 at offset 1; it is left out"),
        ("cut.txt", "né".encode()[:-1], "cut.txt must be UTF-8 text; got 0xc3 at offset 1"),
        ("utf16.txt", "hello".encode("utf-16"), "utf16.txt must be text; got a NUL byte"),
        ("not.txt.gz", b"plain", "not.txt.gz is not: Not a gzipped file"),
        ("half.txt.gz", gzip.compress(os.urandom(1000))[:500], "half.txt.gz is not: damaged or cut short"),
        ("half.txt.bz2", bz2.compress(os.urandom(1000))[:500], "half.txt.bz2 is not: damaged or cut short"),
        ("half.txt.xz", lzma.compress(os.urandom(1000))[:500], "half.txt.xz is not: damaged or cut short"),
        ("half.txt.zst", zstandard.compress(os.urandom(5000))[:2500], "half.txt.zst is not: damaged or cut short"),
        ("not.txt.zst", b"plain text", "not.txt.zst is not: damaged or cut short"),
        ("a.parquet", b"PAR1 no it is not PAR1", "a.parquet must be a parquet file"),
        ("b.parquet", parquet_bytes([{"body": "x"}]), "b.parquet: no column 'text'; columns are body; set data.text_"),
        ("a.jsonl", b'{"text": "x"', "a.jsonl line 1: a line must be JSON in UTF-8"),
        ("b.jsonl", b'{"text": "\xff"}', "b.jsonl line 1: a line must be JSON in UTF-8"),
        ("c.jsonl", b"[" * 100_000, "c.jsonl line 1: a line must be JSON in UTF-8"),
        ("d.jsonl", b'{"content": "x"}', "d.jsonl line 1: no field 'text'; fields are content; set data.text_field"),
    ],
)
def test_junk_is_left_out_by_name_and_the_rest_is_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    found, skipped = read(tmp_path)
    assert found == [Document("good.txt", "good")]
    assert len(skipped) == 1
    assert message in skipped[0]
    assert "\n" not in skipped[0]


def test_a_folder_of_nothing_but_junk_says_what_the_first_problem_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"nothing usable in .*found 1 such files; .*a\.txt must be text"):
        read(tmp_path)


@pytest.mark.parametrize("other", [(), ("image.png",)])
def test_a_folder_without_text_says_what_was_looked_for(tmp_path: Path, other: tuple[str, ...]) -> None:
    for name in other:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"nothing usable in .*\.txt, \.md, .*\.jsonl, .*\.gz.*found 0 such files"
    ) as error:
        read(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_text_before_a_damaged_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (BLOCK_BYTES + 10) + b"\0" + b"y" * 100)
    found, skipped = read(tmp_path)
    assert "".join(document.text for document in found) == "x" * BLOCK_BYTES
    assert found[-1].is_end
    assert f"NUL byte at offset {BLOCK_BYTES + 10}; the rest is left out" in skipped[0]


def test_frames_of_zstd_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"".join(map(zstandard.compress, [b"one ", b"", b"two" * 100_000])))
    assert read(tmp_path)[0] == [Document("a.txt.zst", "one " + "two" * 100_000)]


def test_many_bad_records_are_told_of_a_few_times(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 1000)
    found, skipped = read(tmp_path)
    assert [document.text for document in found] == ["good"]
    assert len(skipped) == 4
    assert "line 2" in skipped[0]
    assert "1000 records are left out in all" in skipped[-1]


def test_a_line_too_long_to_hold_is_left_out(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        file.write('{"text": "one"}\n{"text": "')
        file.write("x" * MAX_LINE_BYTES)
        file.write('"}\n{"text": "three"}')
    found, skipped = read(tmp_path)
    assert [document.name for document in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert len(skipped) == 1
    assert "a.jsonl line 2: a line must have at most 16 MiB" in skipped[0]


def test_a_long_record_comes_in_pieces(tmp_path: Path) -> None:
    text = "word " * 500_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text}))
    found, _ = read(tmp_path, text_field="body")
    assert "".join(document.text for document in found) == text
    assert max(len(document.text) for document in found) <= MAX_PIECE_CHARS


def test_unreadable_files_are_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "folder.txt").mkdir()  # a folder, whatever it is called
    os.mkfifo(tmp_path / "pipe.txt")
    found, skipped = read(tmp_path)
    assert found == [Document("good.txt", "good")]
    assert len(skipped) == 3
    for name, message in zip(("dangling.txt", "pipe.txt", "self.txt"), sorted(skipped), strict=True):
        assert name in message


def test_files_and_folders_without_permission_are_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0)
    if os.access(tmp_path / "secret.txt", os.R_OK):
        pytest.skip("this user may read everything")
    (tmp_path / "closed").mkdir(mode=0)
    found, skipped = read(tmp_path)
    assert found == [Document("good.txt", "good")]
    assert len(skipped) == 2
    assert "closed" in skipped[0]
    assert "secret.txt" in skipped[1]


def test_a_file_that_goes_away_is_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    source = TextFiles(str(tmp_path), text_field="text")
    (tmp_path / "a.txt").unlink()
    skipped: list[str] = []
    assert [document.name for document in source.documents(on_skip=skipped.append)] == ["b.txt"]
    assert "a.txt is not: No such file" in skipped[0]


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep/a.txt").write_text("a")
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "up").symlink_to(inside)
    (outside / "deep/back").symlink_to(inside)
    assert [document.name for document in read(inside)[0]] == ["link/deep/a.txt"]


def test_a_file_name_that_is_not_utf8_can_be_read_and_printed(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    found, _ = read(tmp_path)
    assert found == [Document("caf\\xe9.txt", "x")]
    assert open_source(str(tmp_path)).identity


def test_the_identity_follows_names_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    first = open_source(str(tmp_path)).identity
    assert open_source(str(tmp_path)).identity == first
    os.utime(path, ns=(2, 2))
    second = open_source(str(tmp_path)).identity
    path.rename(tmp_path / "b.txt")
    third = open_source(str(tmp_path)).identity
    (tmp_path / "b.txt").write_text("four")
    os.utime(tmp_path / "b.txt", ns=(2, 2))
    assert len({first, second, third, open_source(str(tmp_path)).identity}) == 4


def test_the_position_grows_to_the_size(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 600_000)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    source = open_source(str(tmp_path))
    positions = [source.position_bytes for _ in source.documents(on_skip=pytest.fail)]
    assert positions == sorted(positions)
    assert 0 < positions[0] < positions[-1]
    assert source.position_bytes == source.num_bytes == 600_000 * 5 + 14


def test_a_missing_parquet_library_is_named_even_if_there_is_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.parquet").write_bytes(parquet_bytes([{"text": "x"}]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python does for a module it cannot find
    with pytest.raises(DataError, match=r"b\.parquet needs the package pyarrow.*pip install 'mfdist\[parquet\]'"):
        read(tmp_path)

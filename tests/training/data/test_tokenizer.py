"""Tokenizers: exact round trips, bytes accounted for, nothing lossy let in."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from mfdist.errors import DataError
from mfdist.training.data.tokenizer import (
    END_OF_DOCUMENT,
    BpeTokenizer,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

SAMPLE = (Path(json.__file__).read_text() + "# Größe, 漢字 🙂\n") * 2


@cache
def bpe() -> BpeTokenizer:
    return train_bpe(iter([SAMPLE]), 400)


def llama2_like() -> LibraryTokenizer:
    """Return a tokenizer in SentencePiece's manner: "▁" for a space, one before the text, bytes where need be."""
    tokens = ["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "▁a", "é"]
    inner = LibraryTokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens(["<unk>", "</s>"])
    return inner


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe()


@pytest.mark.parametrize("make", [ByteTokenizer, bpe])
@given(text=st.text())
@example(text=END_OF_DOCUMENT)
@example(text=f"a{END_OF_DOCUMENT}{END_OF_DOCUMENT} b")
@example(text="e\u0301 \u00a0\u2028\r\n\t\x00 ﬁ Å  ")
@example(text=" leading and trailing \n\n")
def test_text_comes_back_and_its_bytes_are_counted(make: type[ByteTokenizer], text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.end_of_document not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(st.lists(st.integers(0, 399), max_size=30))
def test_a_stream_gives_the_text_of_any_ids_in_whole_characters(ids: list[int]) -> None:
    stream = StreamDecoder(bpe())
    parts = [stream.push(token) for token in ids]
    assert "".join([*parts, stream.finish()]) == bpe().decode(ids)


def test_a_stream_waits_for_the_end_of_a_character() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(value) for value in "a🙂".encode()] == ["a", "", "", "", "🙂"]
    assert stream.finish() == ""
    assert stream.push("🙂".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    texts = ["one", "", "Größe\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_the_end_of_a_document_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_num_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_num_bytes.dtype == np.int64
    assert np.flatnonzero(tokenizer.token_num_bytes == 0).tolist() == [tokenizer.end_of_document]
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_document, *tokenizer.encode("b")]) == "ab"


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.vocab_size, loaded.end_of_document) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )
    assert loaded.encode(f"{SAMPLE}{END_OF_DOCUMENT}") == tokenizer.encode(f"{SAMPLE}{END_OF_DOCUMENT}")


def test_training_learns_and_is_the_same_in_another_process(tmp_path: Path) -> None:
    assert bpe().vocab_size == 400
    assert len(bpe().encode(SAMPLE)) < len(SAMPLE.encode()) * 0.6
    (tmp_path / "sample.txt").write_text(SAMPLE)
    program = (
        "import sys; from pathlib import Path; from mfdist.training.data.tokenizer import train_bpe\n"
        "train_bpe(iter([Path(sys.argv[1]).read_text()]), 400).save(Path(sys.argv[2]))"
    )
    arguments = [str(tmp_path / "sample.txt"), str(tmp_path / "other.json")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=120)
    bpe().save(tmp_path / "here.json")
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_little_text_gives_a_small_vocabulary() -> None:
    tokenizer = train_bpe(iter(["ab"]), 4096)
    assert 257 <= tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("anything, 漢字")) == "anything, 漢字"


def test_a_megabyte_without_a_break_is_trained_on_quickly() -> None:
    # Uncut, this takes minutes: the test's time limit is what fails.
    noise = "".join(chr(97 + (number * number * 7919 >> 5) % 26) for number in range(2**20))
    tokenizer = train_bpe(iter([noise, "\n" * 2**20]), 300)
    assert tokenizer.decode(tokenizer.encode(noise[:1000])) == noise[:1000]


def test_a_byte_level_tokenizer_file_is_taken_whatever_it_adds(tmp_path: Path) -> None:
    inner = LibraryTokenizer.from_str(bpe()._inner.to_str())
    inner.add_special_tokens(["<|pad|>"])
    inner.add_tokens(["<think>"])
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 400)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = "<think>Größe<|pad|>" * 5
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_num_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.vocab_size == 402
    assert tokenizer.token_bytes(400) == b""
    assert tokenizer.token_bytes(401) == b"<think>"


def test_byte_fallback_is_lossless_but_for_the_space_before_the_text(tmp_path: Path) -> None:
    llama2_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = "a b é 漢 \n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == " " + text
    assert tokenizer.token_num_bytes[ids].sum() == len(text.encode()) + 1
    assert tokenizer.end_of_document == 1
    assert tokenizer.token_num_bytes[1] == 0


def test_a_lossy_tokenizer_is_refused(tmp_path: Path) -> None:
    inner = LibraryTokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "hello": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"must be lossless.*this wordlevel tokenizer gives.*use a byte-level one"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    content = json.loads(bpe()._inner.to_str())
    content["added_tokens"] = []
    content["model"]["vocab"]["zzz"] = content["model"]["vocab"].pop(END_OF_DOCUMENT)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="must have a token that ends a document"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"\xff\xfe", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{}", "must be a tokenizer.json"),
        (b'{"kind": "words"}', "must be a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)

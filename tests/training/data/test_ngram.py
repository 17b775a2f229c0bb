"""N-gram baselines against a dictionary of counts, and as proper distributions."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.config import DataConfig
from mfdist.training.data import ngram
from mfdist.training.data.ngram import ByteNgram, baselines, byte_bits_per_byte
from mfdist.training.data.token_store import TokenStore, prepare_tokens
from mfdist.training.events import ignore


def chunks(text: bytes, size: int = 7) -> Iterator[np.ndarray]:
    for start in range(0, len(text), size):
        yield np.frombuffer(text[start : start + size], dtype=np.uint8)


def oracle_bits(training: bytes, text: bytes, order: int) -> float:
    """Witten-Bell by its definition, with dictionaries and Python's floats."""
    padded = b"\n" * order + training
    counts: Counter[bytes] = Counter()
    for length in range(1, order + 2):
        for end in range(order + 1, len(padded) + 1):
            counts[padded[end - length : end]] += 1

    def probability(gram: bytes) -> float:
        lower = 1 / 256 if len(gram) == 1 else probability(gram[1:])
        following = [counts[gram[:-1] + bytes([value])] for value in range(256)]
        kinds = sum(count > 0 for count in following)
        return (counts[gram] + kinds * lower) / (sum(following) + kinds) if kinds else lower

    padded = b"\n" * order + text
    return -sum(math.log2(probability(padded[end - order - 1 : end])) for end in range(order + 1, len(padded) + 1))


TEXT = b"the cat sat on the mat, then the rat ate the cat's hat\n\n\xc3\xa9\x00\xff"


@pytest.mark.parametrize("order", [0, 1, 2])
@given(training=st.binary(max_size=60) | st.just(TEXT), text=st.binary(min_size=1, max_size=30) | st.just(TEXT))
@settings(max_examples=15)
def test_bits_are_those_of_the_definition(order: int, training: bytes, text: bytes) -> None:
    found = byte_bits_per_byte(chunks(training), chunks(text), order)
    assert found == pytest.approx(oracle_bits(training, text, order) / len(text), rel=1e-9)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_probabilities_of_the_next_byte_add_up_to_one(order: int) -> None:
    model = ByteNgram(chunks(TEXT), order)
    for history in (b"th", b"zz", b"\xff\xff", b"e ", b"\n\n"):
        base = int.from_bytes(history[2 - order :], "big") << 8
        probabilities = model.probabilities(np.arange(base, base + 256))
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_more_history_helps_on_text_that_has_structure() -> None:
    text = TEXT * 50
    bits = [byte_bits_per_byte(chunks(text, 1000), chunks(text, 1000), order) for order in (0, 1, 2)]
    assert bits[0] > bits[1] > bits[2]
    assert byte_bits_per_byte(iter([]), chunks(text), 2) == 8


def test_an_order_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order must be in \[0, 2\]; got 3"):
        ByteNgram(chunks(TEXT), 3)


def store_of(tmp_path: Path, tokenizer: str) -> TokenStore:
    (tmp_path / "text").mkdir(exist_ok=True)
    for number in range(40):
        (tmp_path / "text" / f"{number:02}.txt").write_text(
            f"document {number}: " + "the quick brown fox, 漢字 🙂\n" * 20
        )
    config = DataConfig(
        source=str(tmp_path / "text"), tokenizer=tokenizer, vocab_size=300, validation_fraction=0.2, cache_dir=tmp_path
    )
    return prepare_tokens(config, observer=ignore)


def test_baselines_do_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    by_bytes, by_bpe = baselines(store_of(tmp_path, "bytes")), baselines(store_of(tmp_path, "bpe"))
    assert list(by_bytes) == ["byte unigram", "order-2 n-gram"]
    assert by_bytes == pytest.approx(by_bpe)
    assert by_bytes["byte unigram"] > by_bytes["order-2 n-gram"] > 0


def test_baselines_are_kept_and_made_again_when_damaged(tmp_path: Path) -> None:
    store = store_of(tmp_path, "bytes")
    first = baselines(store)
    path = store.directory / "baselines.json"
    assert json.loads(path.read_text()) == first
    path.write_text(json.dumps({name: value + 1 for name, value in first.items()}))
    assert baselines(store) != first  # so it was read, not computed
    for damage in ("", "[]", '{"byte unigram": 3}'):
        path.write_text(damage)
        assert baselines(store) == first
        assert json.loads(path.read_text()) == first


def test_of_a_long_text_parts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, "bytes")
    monkeypatch.setattr(ngram, "_CHUNK_TOKENS", 100)
    num_bytes = sum(map(len, ngram._text_bytes(store.train, store.tokenizer, None)))
    assert num_bytes == store.tokenizer.token_num_bytes[store.train].sum()
    parts = [len(part) for part in ngram._text_bytes(store.train, store.tokenizer, 1000)]
    assert 0 < sum(parts) <= 1000

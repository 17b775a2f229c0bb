"""Baselines that any language model must beat: byte n-grams with interpolated Witten-Bell smoothing."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mfdist.training.data.token_store import TokenStore
from mfdist.training.data.tokenizer import Tokenizer, Tokens

#: The baselines: name -> order.
BASELINES = {"byte unigram": 0, "order-2 n-gram": 2}

MAX_ORDER = 2

#: Training text that is counted; of a longer text, parts spread evenly over it.
MAX_COUNTED_BYTES = 2**26

_CHUNK_TOKENS = 2**19
_CHUNK_BYTES = 2**21

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


class ByteNgram:
    """Probability of the next byte given the `order` bytes before it.

    p_k(c | h) = (n(hc) + t(h) · p_{k-1}(c | h')) / (n(h) + t(h)), where n counts the training text, t(h) is the
    number of different bytes seen after h, and h' is h without its first byte; p_{-1} = 1/256, and p_k = p_{k-1} where
    h was never seen. Memory at order 2: 64 MiB of counts.

    Source: Witten and Bell, "The zero-frequency problem", 1991, interpolated.
    """

    def __init__(self, training: Iterable[Bytes], order: int) -> None:
        """Count the training text, given in consecutive chunks; `order` is in [0, MAX_ORDER]."""
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order must be in [0, {MAX_ORDER}]; got {order}")
        self.order = order
        grams = np.zeros(256 ** (order + 1), dtype=np.uint32)
        for codes in _codes(training, order):
            np.add.at(grams, codes, np.uint32(1))  # as quick as bincount, without a second table
        # The lower orders are sums of the highest, over the first byte: one count of the text serves all.
        self._counts = [grams]
        for _ in range(order):
            self._counts.insert(0, self._counts[0].reshape(256, -1).sum(axis=0, dtype=np.uint32))
        self._totals = [counts.reshape(-1, 256).sum(axis=1, dtype=np.int64) for counts in self._counts]
        self._kinds = [np.count_nonzero(counts.reshape(-1, 256), axis=1) for counts in self._counts]

    def probabilities(self, codes: NDArray[np.int64]) -> Floats:
        """Return the probability of the last byte of each n-gram; a code is its bytes as digits to base 256."""
        result = np.full(codes.shape, 1 / 256)
        for length, (counts, totals, kinds) in enumerate(
            zip(self._counts, self._totals, self._kinds, strict=True), start=1
        ):
            gram = codes % 256**length
            history = gram >> 8
            total, kind = totals[history], kinds[history]
            seen = total > 0
            result[seen] = (counts[gram[seen]] + kind[seen] * result[seen]) / (total[seen] + kind[seen])
        return result

    def bits(self, text: Iterable[Bytes]) -> tuple[float, int]:
        """Return the bits this model needs for a text, given in consecutive chunks, and the text's length in bytes."""
        total, num_bytes = 0.0, 0
        for codes in _codes(text, self.order):
            total -= float(np.log2(self.probabilities(codes)).sum())
            num_bytes += len(codes)
        return total, num_bytes


def byte_bits_per_byte(training: Iterable[Bytes], validation: Iterable[Bytes], order: int) -> float:
    """Return the bits a byte that an n-gram model, counted on `training`, needs for `validation`.

    Args:
        training: uint8 arrays, one text in chunks.
        validation: likewise; at least one byte.
        order: bytes of history, 0 to MAX_ORDER.
    """
    bits, num_bytes = ByteNgram(training, order).bits(validation)
    return bits / max(num_bytes, 1)


def baselines(store: TokenStore) -> dict[str, float]:
    """Return bits a byte of n-gram models on the store's validation text, by name.

    Computed once and kept in the store's directory. At most MAX_COUNTED_BYTES of training text are counted. Documents
    follow each other without a mark; a model that is compared must also foretell where they end.
    """
    path = store.directory / "baselines.json"
    with contextlib.suppress(OSError, ValueError):  # not computed yet, or damaged: then it is computed again
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.keys() == BASELINES.keys():
            return {name: float(kept[name]) for name in BASELINES}
    found = {}
    for name, order in BASELINES.items():
        training = _text_bytes(store.train, store.tokenizer, MAX_COUNTED_BYTES)
        found[name] = byte_bits_per_byte(training, _text_bytes(store.validation, store.tokenizer, None), order)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a result that cannot be kept only costs the next run these seconds
        beside.write_text(json.dumps(found, indent=2), encoding="utf-8")
        beside.replace(path)
    return found


def _codes(text: Iterable[Bytes], order: int) -> Iterator[NDArray[np.int64]]:
    """Yield the code of the n-gram that ends at each byte; newlines stand before the first."""
    before = np.full(order, ord("\n"), dtype=np.uint8)
    for chunk in text:
        for start in range(0, len(chunk), _CHUNK_BYTES):
            part = np.concatenate([before, chunk[start : start + _CHUNK_BYTES]])
            codes = part[order:].astype(np.int64)
            for distance in range(1, order + 1):
                codes += part[order - distance : len(part) - distance].astype(np.int64) << (8 * distance)
            before = part[len(part) - order :]
            yield codes


def _text_bytes(tokens: Tokens, tokenizer: Tokenizer, max_bytes: int | None) -> Iterator[Bytes]:
    """Yield the UTF-8 bytes that tokens stand for, in chunks; of a longer text only about max_bytes, spread evenly."""
    lengths = tokenizer.token_num_bytes
    table = np.frombuffer(b"".join(map(tokenizer.token_bytes, range(tokenizer.vocab_size))), dtype=np.uint8)
    starts = np.cumsum(lengths) - lengths
    chunks = range(0, len(tokens), _CHUNK_TOKENS)
    if max_bytes is not None:
        # Estimated from the first chunk, which is enough to bound memory and time.
        bytes_a_token = max(float(lengths[tokens[:_CHUNK_TOKENS]].mean()), 1e-3)
        num_wanted = max(1, int(max_bytes / (bytes_a_token * _CHUNK_TOKENS)))
        chunks = chunks[:: -(-len(chunks) // num_wanted)]
    for first in chunks:
        part = tokens[first : first + _CHUNK_TOKENS]
        sizes = lengths[part]
        ends = np.cumsum(sizes)
        # Byte j of the output belongs to a token whose bytes start at starts[token] in the table.
        yield table[np.repeat(starts[part] - (ends - sizes), sizes) + np.arange(ends[-1])]

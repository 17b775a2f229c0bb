"""Tokenizers: bytes, byte-level BPE trained on the spot, or a tokenizer.json. All are lossless.

Every token stands for known bytes of UTF-8 text, so that losses in nats a token become bits a byte, and so that
text comes back exactly. This is the only module that imports the library `tokenizers`.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mfdist.errors import DataError

if TYPE_CHECKING:
    import tokenizers

#: Token ids of a text, one-dimensional, as narrow as the vocabulary allows.
Tokens = NDArray[np.uint16] | NDArray[np.uint32]

END_OF_DOCUMENT = "<|endoftext|>"

#: What published tokenizers call the token that ends a document, the most telling first.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<end_of_text>")

#: Text on which a tokenizer must prove that its bytes are known; composed, so that a normaliser to NFC passes.
_PROBE = "A  b\tc\n\n  Übung naïve Ωμέγα 漢字 🙂👩‍💻 0123 'quoted' don't\r\nx=[y]; \x01 end "

#: Runs of more than this are cut where BPE is trained: its time grows with the square of a "word", and a megabyte of
#: base64 has nothing to teach.
_LONG_RUN = re.compile(r"\S{128}(?=\S)|\s{128}(?=\s)")


class Tokenizer(Protocol):
    """Text to token ids in [0, vocab_size) and back."""

    @property
    def kind(self) -> str:
        """`bytes`, or what the library calls the model, such as `bpe`."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; some may be unused."""

    @property
    def end_of_document(self) -> int:
        """Id that follows each document; `encode` never gives it."""

    @property
    def token_num_bytes(self) -> NDArray[np.int64]:
        """[vocab_size]: how many bytes of UTF-8 text each id stands for, 0 for special ones.

        The sum over the ids of a text is the text's length in UTF-8, exactly, for tokenizers that mfdist makes. A
        tokenizer.json may normalise (NFC) or put a space before the text: then it is the length of the text it saw.
        """

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes an id stands for; b"" for special and unused ones."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without `end_of_document`; a special token spelt out in the text is plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, using several cores where that helps."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""

    def save(self, path: Path) -> None:
        """Write the tokenizer to a file for `load_tokenizer`; OSError if that fails."""

    def as_library_json(self) -> tuple[str, str]:
        """Return a tokenizer.json of the library `tokenizers`, and what it calls the token that ends a document."""


class _ByteTable:
    """What the tokenizers share: a table of the bytes each id stands for."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = list(table)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._table)

    @cached_property
    def token_num_bytes(self) -> NDArray[np.int64]:
        """[vocab_size]: bytes each id stands for."""
        return np.array([len(value) for value in self._table], dtype=np.int64)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes an id stands for."""
        return self._table[token]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._table[token] for token in ids).decode("utf-8", "replace")


class ByteTokenizer(_ByteTable):
    """256 ids for the bytes of UTF-8, and 256 for the end of a document."""

    kind = "bytes"
    end_of_document = 256

    def __init__(self) -> None:
        super().__init__([*(bytes([value]) for value in range(256)), b""])

    def encode(self, text: str) -> list[int]:
        """Return the text's bytes."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's bytes."""
        return [self.encode(text) for text in texts]

    def save(self, path: Path) -> None:
        """Write a file that says only that tokens are bytes."""
        path.write_text(json.dumps({"kind": self.kind}), encoding="utf-8")

    def as_library_json(self) -> tuple[str, str]:
        """Return a byte-level BPE without merges, whose ids are these, and the name of the last of them."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        inner = tokenizers.Tokenizer(models.BPE(vocab=_byte_of_character(), merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([END_OF_DOCUMENT])
        return inner.to_str(), END_OF_DOCUMENT


class BpeTokenizer(_ByteTable):
    """A tokenizer of the library `tokenizers` whose tokens stand for known bytes.

    Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-like models with byte fallback (Llama 2) do; WordPiece and
    others that lose white space or letters are refused.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", *, name: str) -> None:
        """Wrap a tokenizer, which belongs to this object from now on.

        Args:
            inner: the tokenizer; its padding, truncation and template are not used.
            name: what messages call it.

        Raises:
            DataError: it is lossy, or has no token for the end of a document.
        """
        inner.no_padding()
        inner.no_truncation()
        # Without this a text that spells "<|endoftext|>" would end its document.
        inner.encode_special_tokens = True
        description = json.loads(inner.to_str())
        super().__init__(_bytes_of_tokens(inner, description))
        self.kind = str(description["model"].get("type") or "bpe").lower()
        self._inner = inner
        end = next((inner.token_to_id(known) for known in _END_NAMES if inner.token_to_id(known) is not None), None)
        if end is None:
            raise DataError(
                f"{name} must have a token that ends a document; it has none of {' '.join(_END_NAMES)}; add one of them"
            )
        self.end_of_document: int = end
        self._table[end] = b""
        seen = b"".join(map(self.token_bytes, self.encode(_PROBE)))
        if seen.removeprefix(b" ") != _PROBE.encode():
            raise DataError(
                f"{name} must be lossless (byte-level, or with byte fallback); this {self.kind} tokenizer gives"
                f" {seen[:40]!r}… for {_PROBE[:20]!r}…; use a byte-level one, data.tokenizer=bpe or bytes"
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; see `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, which the library `tokenizers` reads too."""
        path.write_text(self._inner.to_str(), encoding="utf-8")

    def as_library_json(self) -> tuple[str, str]:
        """Return what `save` writes, and the name of the token that ends a document."""
        return self._inner.to_str(), str(self._inner.id_to_token(self.end_of_document))


class StreamDecoder:
    """Turns ids into text as they come, whole characters only.

    The pieces, with `finish` last, are together `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the characters that are complete with this id; often "" inside a character of several bytes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return what is left: "" or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterator[str], vocab_size: int) -> BpeTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: what to learn from; held as word counts, not as text.
        vocab_size: at least 257; less comes back if the texts do not hold so many different pairs.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_cut_long_runs(texts), trainer)
    return BpeTokenizer(inner, name="the trained tokenizer")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that `save` wrote, or a tokenizer.json of the library `tokenizers`.

    Raises:
        DataError: there is no such file, it is not a tokenizer, or the tokenizer loses text.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read ({error.strerror}); give bytes, bpe or a tokenizer.json"
        ) from None
    except ValueError as error:
        raise DataError(f"tokenizer {path} must be JSON: {error}; give bytes, bpe or a tokenizer.json") from None
    if content == {"kind": ByteTokenizer.kind}:
        return ByteTokenizer()
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        raise DataError(f"tokenizer {path} must be a tokenizer.json of the library tokenizers: {error}") from None
    return BpeTokenizer(inner, name=f"tokenizer {path}")


def _cut_long_runs(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def _bytes_of_tokens(inner: "tokenizers.Tokenizer", description: dict[str, Any]) -> list[bytes]:
    vocabulary = inner.get_vocab(with_added_tokens=True)
    # The kinds of pre-tokenizer may be nested; their name appears nowhere else.
    is_byte_level = '"ByteLevel"' in json.dumps(description.get("pre_tokenizer"))
    to_byte = _byte_of_character() if is_byte_level else {}
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if is_byte_level and all(character in to_byte for character in token):
            table[number] = bytes(to_byte[character] for character in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[number] = bytes.fromhex(token[3:5])
        else:
            table[number] = token.replace("▁", " ").encode()
    for number, added in inner.get_added_tokens_decoder().items():
        table[number] = b"" if added.special else added.content.encode()
    return table


def _byte_of_character() -> dict[str, int]:
    """Return the alphabet of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + index): value for index, value in enumerate(others)}

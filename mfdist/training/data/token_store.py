"""Tokenised text on disk: made once, memory-mapped, split into training and validation by document.

A store is a folder of four files, whole or not there at all:

    train.bin, validation.bin   token ids, little-endian uint16, or uint32 where the vocabulary needs it; every
                                document is followed by the tokenizer's end_of_document
    tokenizer.json              for `load_tokenizer`
    store.json                  counts, type, fingerprint, and what the text was
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdist.config import DataConfig
from mfdist.errors import DataError
from mfdist.training.data.cache import default_cache_dir, make_once
from mfdist.training.data.documents import Document, Source, open_source
from mfdist.training.data.split import SplitWriter, is_held_out
from mfdist.training.data.tokenizer import ByteTokenizer, Tokenizer, Tokens, load_tokenizer, train_bpe
from mfdist.training.events import Observer, Preparing, Warned

#: Raised when the files, or what is made of a text, change; part of the key of a cached store.
STORE_FORMAT = 1

#: Text that a BPE is trained on, in characters; of a longer source, files drawn at random.
BPE_SAMPLE_CHARS = 2**24

_VOCAB_WITHOUT_MERGES = 257  # the bytes, and the end of a document

_TRAIN, _VALIDATION, _TOKENIZER, _META = "train.bin", "validation.bin", "tokenizer.json", "store.json"

_BATCH_CHARS_PER_CORE = 2**20  # tokenised at a time, at most _MAX_BATCH_CHARS
_MAX_BATCH_CHARS = 2**24
_REPORT_CHARS = 2**21
_CHUNK_TOKENS = 2**20  # counted at a time
_SKIPS_TOLD = 20


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Training and validation text as token ids."""

    directory: Path
    train: Tokens  # [num_train], memory-mapped, read-only
    validation: Tokens  # [num_validation], likewise
    tokenizer: Tokenizer
    validation_num_bytes: int  # of UTF-8 text that `validation` stands for
    fingerprint: str  # SHA-256 over tokens and tokenizer: equal fingerprints, equal batches


def prepare_tokens(config: DataConfig, *, observer: Observer) -> TokenStore:
    """Return the tokens of the configured text, from the cache where they are there already.

    They lie in `<cache>/tokens/<key>`; the key is made of the source's identity (its files' names, sizes and times, not
    their content) and of the configuration. Several processes may ask at the same time: see `make_once`.

    Args:
        config: the text, the tokenizer and the split.
        observer: told of the progress (`Preparing`) and of what is left out (`Warned`).

    Raises:
        DataError: there is no usable text or tokenizer, or the cache cannot be written; nothing half-made is left.
        UnavailableError: another process has been preparing the same text for a day; a retry is safe.
    """
    source = open_source(config.source, text_field=config.text_field)
    cache_dir = config.cache_dir.expanduser() if config.cache_dir else default_cache_dir()
    target = cache_dir / "tokens" / _key(config, source)
    make_once(
        target,
        lambda directory: _make(directory, config, source, observer),
        on_wait=lambda activity: observer(Preparing(activity=activity, done=0, total=None, unit="s")),
    )
    return open_tokens(target)


def open_tokens(directory: str | Path) -> TokenStore:
    """Map the tokens of a store.

    Raises:
        DataError: it is no store, is of another format, or its files are not as long as they were when it was made.
    """
    directory = Path(directory)
    try:
        meta: dict[str, Any] = json.loads((directory / _META).read_text(encoding="utf-8"))
        if meta["format"] != STORE_FORMAT:
            raise ValueError(f"its format is {meta['format']}, not {STORE_FORMAT}")
        dtype = np.dtype(meta["dtype"])
        return TokenStore(
            directory=directory,
            train=_mapped(directory / _TRAIN, dtype, meta["num_train_tokens"]),
            validation=_mapped(directory / _VALIDATION, dtype, meta["num_validation_tokens"]),
            tokenizer=load_tokenizer(directory / _TOKENIZER),
            validation_num_bytes=meta["validation_num_bytes"],
            fingerprint=meta["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise DataError(f"token store {directory} must be whole: {reason}; remove it, and it is made anew") from None


def _make(directory: Path, config: DataConfig, source: Source, observer: Observer) -> None:
    tokenizer = _tokenizer(config, source, observer)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    skips = _Skips(observer)
    writer = SplitWriter(
        directory / _TRAIN, directory / _VALIDATION, dtype, seed=config.seed, fraction=config.validation_fraction
    )
    with writer:
        for batch in _batches(source.documents(on_skip=skips)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                writer.append(document.name, [*ids, tokenizer.end_of_document] if document.is_end else ids)
            observer(Preparing(activity="tokenising", done=source.position_bytes, total=source.num_bytes, unit="bytes"))
        skips.finish()
        for remark in writer.finish():
            observer(Warned(message=f"{config.source}: {remark}"))
    tokenizer.save(directory / _TOKENIZER)
    _write_meta(directory, tokenizer, dtype, source.identity)


def _tokenizer(config: DataConfig, source: Source, observer: Observer) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)

    def sample() -> Iterator[str]:
        done = told = 0
        # What cannot be read is told of when it is tokenised.
        for document in source.documents(on_skip=lambda message: None, shuffle_seed=config.seed):
            if is_held_out(document.name, config.seed, config.validation_fraction):
                continue
            yield document.text
            done += len(document.text)
            if done - told >= _REPORT_CHARS:
                observer(Preparing(activity="reading text for the tokenizer", done=done, total=None, unit="characters"))
                told = done
            if done >= BPE_SAMPLE_CHARS:
                break
        observer(Preparing(activity="training the tokenizer", done=0, total=None, unit="merges"))

    made = train_bpe(sample(), config.vocab_size)
    merges = made.vocab_size - _VOCAB_WITHOUT_MERGES
    observer(Preparing(activity="training the tokenizer", done=merges, total=merges, unit="merges"))
    return made


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size, full = 0, min(_BATCH_CHARS_PER_CORE * (os.cpu_count() or 1), _MAX_BATCH_CHARS)
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= full:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Skips:
    """Passes on the first remarks about text that is left out, and counts the rest."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._count = 0

    def __call__(self, message: str) -> None:
        self._count += 1
        if self._count <= _SKIPS_TOLD:
            self._observer(Warned(message=message))

    def finish(self) -> None:
        if self._count > _SKIPS_TOLD:
            self._observer(Warned(message=f"{self._count - _SKIPS_TOLD} more remarks of this kind are not shown"))


def _write_meta(directory: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], description: str) -> None:
    validation = np.memmap(directory / _VALIDATION, dtype=dtype, mode="r")
    meta = {
        "format": STORE_FORMAT,
        "dtype": dtype.str,
        "num_train_tokens": (directory / _TRAIN).stat().st_size // dtype.itemsize,
        "num_validation_tokens": len(validation),
        "validation_num_bytes": _num_bytes(validation, tokenizer.token_num_bytes),
        "fingerprint": _fingerprint(directory, dtype),
        "text": description,
    }
    (directory / _META).write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _num_bytes(tokens: NDArray[Any], token_num_bytes: NDArray[np.int64]) -> int:
    starts = range(0, len(tokens), _CHUNK_TOKENS)
    return sum(int(token_num_bytes[tokens[start : start + _CHUNK_TOKENS]].sum()) for start in starts)


def _fingerprint(directory: Path, dtype: np.dtype[Any]) -> str:
    digest = hashlib.sha256(dtype.str.encode())
    for name in (_TOKENIZER, _TRAIN, _VALIDATION):
        with (directory / name).open("rb") as file:
            # A file's own digest has a fixed length: where one file ends and the next begins cannot be mistaken.
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any], num_tokens: int) -> Tokens:
    wanted, size = num_tokens * dtype.itemsize, path.stat().st_size
    if size != wanted:
        raise ValueError(f"{path.name} has {size} bytes, not {wanted}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))


def _key(config: DataConfig, source: Source) -> str:
    tokenizer = config.tokenizer
    if tokenizer == "bpe":
        tokenizer = f"bpe {config.vocab_size}"
    elif tokenizer != "bytes":
        path = Path(tokenizer).expanduser()
        try:
            tokenizer = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(
                f"data.tokenizer must be bytes, bpe or the path of a tokenizer.json;"
                f" {path} cannot be read: {error.strerror}"
            ) from None
    parts = (STORE_FORMAT, source.identity, tokenizer, config.validation_fraction, config.seed)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

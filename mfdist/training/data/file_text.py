"""The bytes and the text of one file, compressed or not, in bounded blocks."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from mfdist.errors import DataError

#: Bytes read at a time; a file of one block or less is taken whole or not at all.
BLOCK_BYTES = 2**20

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# One byte of zstd can stand for 32 KiB of text, so what is fed to it at a time bounds the memory that comes back.
_ZSTD_FEED_BYTES = 2**10


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """Return a stream of what `raw` holds; `compression` is one of COMPRESSIONS, or "" for none."""
    match compression:
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case ".bz2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case ".zst":
            return io.BufferedReader(_ZstdStream(raw), BLOCK_BYTES)
        case _:
            return raw


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever reading `path` may raise into a DataError that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        reason = f"damaged or cut short: {str(error) or type(error).__name__}"
    else:
        return
    raise DataError(f"text must be readable; {path} is not: {reason}; what cannot be read is left out")


def text_blocks(path: Path, stream: BinaryIO | None = None) -> Iterator[str]:
    """Yield the text of a file in blocks of about BLOCK_BYTES, without a byte order mark.

    Args:
        path: the file; only named in messages if `stream` is given.
        stream: what to read instead, at its beginning.

    Raises:
        DataError: the file cannot be read or is not UTF-8 text. Blocks before the offending one were yielded.
    """
    with readable(path):
        if stream is None:
            with path.open("rb") as opened:
                yield from _decode(path, opened)
        else:
            yield from _decode(path, stream)


def _decode(path: Path, stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    while True:
        block = stream.read(BLOCK_BYTES)
        left_out = "the rest is left out" if position else "it is left out"
        if (nul := block.find(0)) >= 0:
            raise DataError(f"{path} must be text; got a NUL byte at offset {position + nul}; {left_out}")
        is_last = len(block) < BLOCK_BYTES
        carried = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=is_last)
        except UnicodeDecodeError as error:
            offset = position - carried + error.start
            raise DataError(
                f"{path} must be UTF-8 text; got 0x{error.object[error.start]:02x} at offset {offset};"
                f" {left_out}; convert it to UTF-8"
            ) from None
        if text:
            yield text
        if is_last:
            return
        position += len(block)


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame; unlike the library's own reader it notices a file that is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # RawIOBase allows any writable buffer
        while not self._ready:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._is_inside_frame = False
            compressed = compressed or self._raw.read(_ZSTD_FEED_BYTES)
            if not compressed:
                if self._is_inside_frame:
                    raise EOFError("the last frame has no end")
                return 0
            self._is_inside_frame = True
            self._ready = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

"""Checksums: crc32c finds damage, 128 bits of xxh3 tell whether contents changed; both let other threads run."""

import crc32c as _crc32c
import xxhash

from mfdist.checkpoint.durability import Bytes


def crc32c(data: Bytes, value: int = 0) -> int:
    """Return the crc32c of contiguous bytes, going on from `value`."""
    return int(_crc32c.crc32c(data, value, gil_release_mode=1))


def checksum(data: Bytes) -> str:
    """Return the crc32c as the manifest has it: eight hexadecimal digits."""
    return f"{crc32c(data):08x}"


def digest(data: Bytes) -> str:
    """Return xxh3 of 128 bits as 32 hexadecimal digits; equal digests mean equal contents."""
    return xxhash.xxh3_128_hexdigest(data)

"""Waiting until something is on disk."""

import os
from pathlib import Path
from typing import TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview


def fsync(path: Path) -> None:
    """Wait until a file's contents, or a directory's list of names, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, *parts: Bytes, is_lasting: bool = True) -> None:
    """Write a new file and, if it is to last, wait until its contents are on disk; its name is synced apart."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            left = memoryview(part)
            while left:  # a single call writes 2 GiB at most
                left = left[os.write(fd, left) :]
        if is_lasting:
            os.fsync(fd)
    finally:
        os.close(fd)

"""Waiting until something is on disk."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Wait until a file's contents, or a directory's list of names, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until its contents are on disk; its name is not until its directory is synced."""
    path.write_bytes(data)
    fsync(path)

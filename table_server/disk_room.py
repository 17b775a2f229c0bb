"""Whether it is for want of room that a disk cannot be written; SQLite calls that an I/O error, as if it broke."""

import os
from pathlib import Path

_LEAST_BYTES = 1 << 20  # of room, below which files of a log cannot be counted on to find any


def reason_of(error: Exception, path: Path) -> str:
    """Return what to tell people of an error that came of reading or writing files at `path`.

    Args:
        error: as SQLite or the system raised it.
        path: a file or folder, which need not be there.
    """
    folder = path if path.is_dir() else path.parent
    try:
        disk = os.statvfs(folder)
    except OSError:
        return str(error)
    if (free_bytes := disk.f_bavail * disk.f_frsize) < _LEAST_BYTES:
        return f"the disk is full, {free_bytes} bytes are free ({error})"
    if disk.f_files and not disk.f_favail:
        return f"the disk has no room for another file ({error})"
    return str(error)

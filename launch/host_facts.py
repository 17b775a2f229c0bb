"""What a host of a cluster is found to be, by a look at it from within; `preflight` compares hosts by it.

The look travels to hosts whose mfdist may be another one, or broken, so this module imports nothing but Python's own.
"""

import hashlib
import importlib.util
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict


class HostFacts(TypedDict):
    """One host.

    Args:
        python, ray, torch: versions; empty: not installed.
        mfdist: a digest of the sources that an import finds there; empty: none.
        missing: distributions that are not installed.
        unseen: of the paths that were asked for, those that are not there.
        may_write: whether it may write where the run will be, or sees no such folder.
        clock_s: seconds since the epoch.
    """

    python: str
    ray: str
    torch: str
    mfdist: str
    missing: list[str]
    unseen: list[str]
    may_write: bool
    clock_s: float


def look(folder: str, paths: Sequence[str], needed: Sequence[str]) -> HostFacts:
    """Return the facts of the host that this process is on.

    Args:
        folder: where the run will be.
        paths: that every host must see.
        needed: distributions that it must have.
    """
    return HostFacts(
        python=platform.python_version(),
        ray=_version("ray"),
        torch=_version("torch"),
        mfdist=_digest("mfdist"),
        missing=[name for name in needed if not _version(name)],
        unseen=[path for path in paths if not Path(path).exists()],
        may_write=os.access(folder, os.W_OK) or not Path(folder).exists(),
        clock_s=time.time(),
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _digest(package: str) -> str:
    """Return a digest of all of a package's sources, in 8 letters."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return ""
    digest = hashlib.sha256()
    top = found.submodule_search_locations[0]
    for folder, folders, files in os.walk(top, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                digest.update(f"{path.relative_to(top)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:8]

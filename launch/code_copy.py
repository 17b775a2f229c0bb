"""This package as a folder of its own, as it is sent to the hosts of a cluster."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mfdist

_LEFT_OUT = ("*.pyc",)  # compiled kernels (.nbi, .nbc) go along: making them takes every host a minute


@contextlib.contextmanager
def copy_of_code() -> Iterator[str]:
    """Give a folder that holds this package alone, as real files, to be sent to other hosts.

    As their working folder, and not as Ray's py_modules: beside those, workers would look into this process's own
    folder first, where another version may lie on another host.
    """
    package = Path(mfdist.__file__).absolute().parent
    with tempfile.TemporaryDirectory(prefix="mfdist-code-") as folder:
        shutil.copytree(package, Path(folder, package.name), ignore=shutil.ignore_patterns(*_LEFT_OUT))
        yield folder

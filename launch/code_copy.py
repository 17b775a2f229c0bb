"""This package as a folder of its own, as it is sent to the hosts of a cluster."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mfdist
from mfdist.errors import UnavailableError

_LEFT_OUT = ("*.pyc",)  # compiled kernels (.nbi, .nbc) go along: making them takes every host a minute


@contextlib.contextmanager
def expected_whole(host: str) -> Iterator[None]:
    """Say of a module of this package that cannot be imported that the host has a part of the package.

    A host that dies while Ray unpacks what was sent keeps a part, which Ray takes for all of it when the host is back.

    Raises:
        UnavailableError: in place of the import's error; another host may have all of it.
    """
    try:
        yield
    except ImportError as error:
        if not f"{error.name}.".startswith(f"{mfdist.__name__}."):
            raise
        around = Path(mfdist.__file__).absolute().parents[1]
        was_sent = around.name.startswith("_ray_pkg_")
        remedy = f"end its node, remove {around} there, and start it again" if was_sent else "install it there again"
        raise UnavailableError(
            f"a host must have all of mfdist; {host} has a part in {around}"
            f"{', as where it died while Ray unpacked it' if was_sent else ''}: {error}; {remedy}"
        ) from error


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

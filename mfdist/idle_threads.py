"""How the threads of kernels wait for the next one: asleep.

By default OpenMP's spin for milliseconds after each, on cores that gRPC, clients or other programs would use. Training
that shares its two cores then makes an eighth of the steps that it makes with threads that sleep; by itself, 3 % more.
"""

import contextlib
import os
from collections.abc import Iterator

_SETTING = "OMP_WAIT_POLICY"


def sleep() -> None:
    """Have this process's threads sleep, unless its environment says otherwise. Called before torch is imported."""
    os.environ.setdefault(_SETTING, "passive")


@contextlib.contextmanager
def asleep_in_children() -> Iterator[None]:
    """Have the threads of processes that begin meanwhile sleep, unless the environment says otherwise."""
    is_told = _SETTING in os.environ
    sleep()
    try:
        yield
    finally:
        if not is_told:
            del os.environ[_SETTING]

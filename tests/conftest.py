"""What every test has: its own caches, a fixed seed, and GPU tests skipped where there is no GPU."""

import os
import signal
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines differ in speed and are shared: no deadline an example, and no example lost to a slow moment. What passed
# passes again: examples are the same in each run, and `make test-all` looks for others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("mfdist", settings.get_profile("search"), derandomize=True)
settings.load_profile("mfdist")


# A shell lets what runs in its background ignore Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say which builds a result belongs to."""
    names = ("torch", "triton", "numba", "numpy", "zarr")
    return "with: " + ", ".join(f"{name} {_version(name)}" for name in names) + f"; {os.cpu_count()} cores"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tokenised text of tests, and of the processes they start, out of the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    cache = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    yield cache
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same random numbers, whichever tests ran before; tests without torch stay quick."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)

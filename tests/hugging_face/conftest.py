"""Models small enough to make on the spot, and the library's own caches kept out of the user's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when the library is first imported; nothing here may reach a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mfdist.hugging_face.library  # noqa: F401 - before transformers, which would take our kernels/ for another's


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: these models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

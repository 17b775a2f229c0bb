"""A run small enough to train in a second, on text made on the spot."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mfdist.config import RunConfig, parse_config
from mfdist.training.run import RunDirectory

TINY = """
name = "tiny test"
[model]
num_layers = 2
hidden_dim = 32
num_heads = 2
bits = 4
max_seq_len = 64
[data]
source = "{source}"
tokenizer = "bytes"
validation_fraction = 0.2
cache_dir = "{cache}"
[optimizer.dense]
lr = 5e-3
[training]
steps = 12
batch_size = 4
seq_len = 32
device = "cpu"
eval_every = 5
eval_sequences = 8
[checkpoint]
every = 4
"""

_WORDS = ["the", "a", "row", "table", "memory", "looks", "up", "adds", "bits", "code", "score", "sums", "then", "layer"]


def write_text(folder: Path, num_files: int = 12, seed: int = 0) -> None:
    """Write files of made-up sentences, enough for a few hundred sequences."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    for index in range(num_files):
        sentences = (" ".join(chance.choices(_WORDS, k=8)).capitalize() + ".\n" for _ in range(30))
        (folder / f"{index:02}.txt").write_text("".join(sentences))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: these models are too small for more, and spinning threads starve what runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_config(tmp_path: Path) -> RunConfig:
    """A valid configuration over a folder of text under `tmp_path`."""
    write_text(tmp_path / "text")
    return parse_config(TINY.format(source=tmp_path / "text", cache=tmp_path / "cache"), origin="TINY")


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_config: RunConfig) -> RunDirectory:
    """A new run of `tiny_config`."""
    return RunDirectory.create(tmp_path / "run", tiny_config)

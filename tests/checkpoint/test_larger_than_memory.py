"""A model whose tables are larger than this machine's memory writes from its checkpoint's files."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from mfdist.checkpoint.mapping import _Reserved
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.config import parse_config
from mfdist.layers import MemoryLayer
from mfdist.models import Transformer, build_model
from mfdist.training.data.tokenizer import ByteTokenizer
from mfdist.training.generation import GenerationConfig, Generator
from mfdist.training.optimizer import table_parameter_names
from mfdist.training.run import RunDirectory
from tests.checkpoint.test_mapping import WRITER

SIZE_OF_MEMORY = 1.15
#: Rows that are made, and then come again; no power of two, so that a row taken from a wrong place is another one.
PATTERN_ROWS = 1000
CONFIG = """
[model]
num_layers = {num_layers}
hidden_dim = 2048
num_heads = 16
bits = 8
max_seq_len = 512
[data]
source = "bytes"
tokenizer = "bytes"
[training]
steps = 1
batch_size = 1
seq_len = 64
device = "cpu"
"""


def repeated(num_rows: int, row_dim: int, folder: Path) -> Tensor:
    """Return a large matrix that takes the memory of its first rows, which are mapped again and again."""
    pattern = torch.randn(PATTERN_ROWS, row_dim) * 0.02
    assert pattern.nbytes % 4096 == 0
    file = folder / f"{row_dim}-{len(list(folder.iterdir()))}"
    file.write_bytes(pattern.numpy().tobytes())
    count = math.ceil(num_rows / PATTERN_ROWS)
    memory = _Reserved(count * pattern.nbytes)
    for number in range(count):
        memory.back(number * pattern.nbytes, file, pattern.nbytes)
    return memory.tensor(torch.float32)[: num_rows * row_dim].view(num_rows, row_dim)


def large_run(folder: Path, size: float) -> tuple[RunDirectory, Transformer]:
    """Write a run with one step of tables of `size` times this machine's memory; return it and the same model."""
    of_one_layer = 264 * 2048**2 * 4
    num_layers = math.ceil(size * psutil.virtual_memory().total / of_one_layer)
    if shutil.disk_usage(folder).free < (num_layers + 1.5) * of_one_layer:
        pytest.skip(f"needs {num_layers * of_one_layer / 1e9:.0f} GB of disk")
    run = RunDirectory.create(folder / "run", parse_config(CONFIG.format(num_layers=num_layers), origin="CONFIG"))
    ByteTokenizer().save(run.tokenizer_path)
    config = run.config.model.model_copy(update={"vocab_size": ByteTokenizer().vocab_size})
    torch.manual_seed(5)
    model = build_model(config, device="cpu", table_device="meta")
    (folder / "patterns").mkdir()
    tables = {}
    for layer in model.modules():
        if isinstance(layer, MemoryLayer):
            spec = layer.table.spec
            rows = repeated(spec.num_rows, spec.row_dim, folder / "patterns")
            layer.table.weight = nn.Parameter(rows, requires_grad=False)
            tables[spec.name] = TableState(weight=rows, optimizer={})
    names = table_parameter_names(model)
    dense = {f"model/{name}": value.detach() for name, value in model.named_parameters() if name not in names}
    written = run.config.model_copy(update={"model": config})
    attributes = {"config": written.to_toml(), "data": {"fingerprint": "none"}}
    run.checkpoints.save(CheckpointState(step=1, tables=tables, dense=dense, attributes=attributes))
    return run, model.eval().requires_grad_(False)


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="files are laid at fixed addresses, as Linux does it")
def test_tables_larger_than_memory_write_what_the_same_rows_in_memory_write(tmp_path):
    try:
        run, model = large_run(tmp_path, SIZE_OF_MEMORY)
        generator = Generator(model, ByteTokenizer())
        expected = "".join(generator.stream("the", GenerationConfig(num_tokens=8, temperature=0.0)))
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(run.path)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["text"] == expected
        assert found["grown"][0] < 1 << 30  # its own memory; the rest is pages of files
    finally:
        shutil.rmtree(tmp_path)

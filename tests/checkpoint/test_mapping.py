"""Tables of a step as mapped memory: the same lookups, little memory, and files that are not what was saved refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.mapping import map_rows
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.checkpoint.step_files import StepFiles
from mfdist.config import parse_config
from mfdist.errors import CheckpointError, RowIdError
from mfdist.optim import RowSGD
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.tables.mapped import MappedTable
from mfdist.training.generation import GenerationConfig, load_generator
from mfdist.training.loop import train
from mfdist.training.run import RunDirectory
from tests.training.conftest import TINY, write_text

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are laid at fixed addresses, as Linux does it")


def saved(folder, weight):
    state = CheckpointState(step=1, tables={"t": TableState(weight=weight)}, dense={}, attributes={})
    return CheckpointDirectory(folder).save(state)


def mapped(info):
    with StepFiles(info.path) as files:
        array = files.array("tables/t/weight")
        num_rows, row_dim = array.grid.shape
        spec = TableSpec(name="t", num_rows=num_rows, row_dim=row_dim, dtype=array.dtype)
        return MappedTable(spec, map_rows(files, array)), array.grid


# One file of one chunk; of several, the last padded; files by rows; by rows and columns, the last of both padded.
SHAPES = [(7, 5), (3000, 33), (16384, 64), (32768, 256), (10 * 256, 1030), (20000, 519)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_looks_up_what_the_checkpoint_holds(tmp_path, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    table, grid = mapped(saved(tmp_path, weight))
    local = LocalTable(TableSpec(name="t", num_rows=shape[0], row_dim=shape[1], dtype=dtype))
    local.weight.data = weight
    for num_tokens in (0, 1, 63):
        ids, scores = torch.randint(0, shape[0], (num_tokens, 5)), torch.rand(num_tokens, 5)
        assert torch.equal(table(ids, scores), local(ids, scores)), grid
    if shape[0] % 256 == 0:
        codes, scores = torch.randint(0, 256, (9, shape[0] // 256), dtype=torch.uint8), torch.rand(9, shape[0] // 256)
        assert torch.equal(table(codes, scores, code_stride=256), local(codes, scores, code_stride=256))
    with pytest.raises(RowIdError, match=rf'row id {shape[0]} .* table "t"'):
        table(torch.tensor([[0, shape[0]]]), torch.ones(1, 2))


def test_the_largest_of_these_have_several_blocks_of_columns(tmp_path):
    blocks = [mapped(saved(tmp_path / str(shape), torch.zeros(shape)))[0].first_rows.numel() for shape in SHAPES]
    assert blocks == [1, 1, 1, 4, 1, 4]


def test_scores_have_gradients_and_rows_are_not_trained(tmp_path):
    weight = torch.randn(16384, 256)
    table, _ = mapped(saved(tmp_path, weight))
    ids, scores = torch.randint(0, 16384, (4, 3)), torch.rand(4, 3, requires_grad=True)
    table(ids, scores).sum().backward()
    torch.testing.assert_close(scores.grad, weight.sum(1)[ids], rtol=1e-4, atol=1e-4)
    assert list(table.parameters()) == [] and table.state_dict() == {}
    with pytest.raises(NotImplementedError, match=r'mapped rows are for inference; .* table "t"'):
        table.fuse(RowSGD(lr=0.1))


def test_rows_outlive_their_files(tmp_path):
    weight = torch.randn(16384, 64)
    info = saved(tmp_path, weight)
    table, _ = mapped(info)
    for path in Path(info.path).rglob("c.*"):
        path.unlink()
    assert torch.equal(table(torch.tensor([[16000]]), torch.ones(1, 1))[0], weight[16000])


def test_files_that_are_not_what_was_saved_are_refused(tmp_path):
    info = saved(tmp_path, torch.randn(16384, 64))
    files = sorted(Path(info.path).rglob("c.*"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"table 't' weight rows \d+ to \d+: .* has \d+ bytes, not the \d+ in"):
        mapped(info)
    files[1].write_bytes(whole[:-60] + bytes(56) + whole[-4:])  # the index is nonsense
    with pytest.raises(CheckpointError, match=r"its index does not say where its chunks are|not in order"):
        mapped(info)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"is missing"):
        mapped(info)


def test_files_whose_end_is_no_pages_are_read(tmp_path):
    weight = torch.randn(2560, 1030)
    info = saved(tmp_path, weight)
    table, grid = mapped(info)
    assert len(list(grid.files())) > 1 and grid.rows_per_file * grid.columns_per_file * 4 % 4096
    shutil.rmtree(info.path)
    assert table.first_rows.numel() == 1
    assert torch.equal(table(torch.tensor([[2559]]), torch.ones(1, 1))[0], weight[2559])


WRITER = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mfdist import MemoryLayer
from mfdist.training.generation import GenerationConfig, load_generator
from mfdist.training.run import RunDirectory

def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(key + r":\\s+(\\d+)", status)[1]) << 10 for key in ("RssAnon", "VmRSS")]

with torch.inference_mode():
    MemoryLayer(8, 8, 4)(torch.zeros(1, 8))  # what the kernels' code takes
before = resident()
generator = load_generator(RunDirectory.open(sys.argv[1]), map_tables=True)
text = "".join(generator.stream("the", GenerationConfig(num_tokens=8, temperature=0.0)))
print(json.dumps({"text": text, "grown": [after - first for after, first in zip(resident(), before)]}))
"""


def test_writing_takes_a_small_part_of_the_tables_memory(tmp_path):
    write_text(tmp_path / "text", num_files=4)
    text = TINY.format(source=tmp_path / "text", cache=tmp_path / "cache")
    large = ["model.hidden_dim=56", "model.bits=14", "model.num_heads=4"]
    quick = ["training.steps=1", "training.seq_len=8", "optimizer.tables.rule=sgd", "optimizer.tables.lr=0.1"]
    run = RunDirectory.create(tmp_path / "run", parse_config(text, origin="TINY", overrides=[*large, *quick]))
    train(run)
    generator = load_generator(run)
    tables = sum(parameter.nbytes for name, parameter in generator.model.named_parameters() if "table" in name)
    assert tables > 200 << 20
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(run.path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"] == "".join(generator.stream("the", GenerationConfig(num_tokens=8, temperature=0.0)))
    own, with_page_cache = found["grown"]
    assert own < tables / 20
    assert with_page_cache < tables / 2  # the system maps the neighbours of a row along, as far as it has them

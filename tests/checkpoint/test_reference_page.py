"""The page for readers without mfdist tells the truth: its programs run, and its manifest rules hold."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import xxhash

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState
from mfdist.config import RunConfig, parse_config
from mfdist.layers import MemoryLayer
from mfdist.models import Transformer, build_model
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.state import capture

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "checkpoint-layout.md"
State = Callable[..., CheckpointState]
#: One head width that is rotated in part, three blocks, sizes that no other size equals.
RUN = """
[model]
num_layers = 3
hidden_dim = 48
num_heads = 3
bits = 4
extra_bits = 2
vocab_size = 29
rotary_fraction = 0.5
[optimizer.dense]
lr = 1e-2
[training]
steps = 1
batch_size = 1
seq_len = 8
device = "cpu"
"""


def programs() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert not any("mfdist" in program for program in found)
    return found


def test_the_program_on_the_page_reads_a_checkpoint(
    directory: CheckpointDirectory, small_state: State, tmp_path: Path
) -> None:
    state = small_state(12)
    program, *_ = programs()
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, directory.save(state).path],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=tmp_path,
    )
    header, *lines = process.stdout.splitlines()
    assert header == f"step 12 {state.attributes}"
    weight = state.tables["blocks.0.qkv"].weight
    path, dtype, *_, total = lines[0].split()
    assert (path, dtype) == ("tables/blocks.0.qkv/weight", "bfloat16")
    assert abs(float(total) - float(weight.double().abs().sum())) < 0.01
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ((), 1e-5),
        (('model.score="released"', "model.score_temperature=0.7", "model.extra_bits=1"), 1e-5),
        (('model.table_dtype="bf16"', 'optimizer.tables.rule="adam"'), 2**-7),  # sums are rounded as rows are
    ],
)
def test_the_programs_on_the_page_compute_what_the_model_does(
    settings: tuple[str, ...],
    tolerance: float,
    directory: CheckpointDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse_config(RUN, origin="RUN", overrides=settings)
    model = trained_alike(config)
    optimizer = RunOptimizer(model, config.optimizer)
    path = directory.save(capture(model, optimizer, step=7, config=config, data_fingerprint="")).path
    tokens = torch.randint(29, (1, 8), generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr("sys.argv", ["program", str(path), *(str(int(token)) for token in tokens[0])])
    program: dict[str, Any] = {}
    exec("".join(programs()[1:]), program)

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MemoryLayer)}
    assert list(layers) == [f"blocks.{block}.{part}" for block in range(3) for part in ("qkv", "ffn1", "ffn2")]
    for name, layer in layers.items():
        x = torch.randn(63, layer.in_features)
        expected = layer(x).detach().numpy()
        found = program["memory_layer"](name, x.numpy(), layer.hash.bits)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    shown = int(capsys.readouterr().out.split()[-1])
    if tolerance < 1e-4:  # rounding to bf16 turns signs
        expected = model(tokens)[0].detach().numpy()
        np.testing.assert_allclose(program["logits"](tokens[0].numpy()), expected, rtol=1e-3, atol=1e-3)
        assert shown == expected[-1].argmax()


def trained_alike(config: RunConfig) -> Transformer:
    """A model none of whose parameters is where it began, and in which all that the page says tells.

    Queries and keys are large, so that attention is uneven; what is added to the residual is so small that a norm's eps
    changes it.
    """
    torch.manual_seed(0)
    model = build_model(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape)
            if "norm" in name:
                parameter.copy_(1 + drawn / 2)
            else:
                parameter.copy_(drawn if name == "head.weight" else drawn * 0.003)
            if "qkv" in name:
                parameter[..., :96] = drawn[..., :96]
    return model


def test_the_manifest_can_be_checked_as_the_page_says(directory: CheckpointDirectory, small_state: State) -> None:
    path = directory.save(small_state()).path
    attributes = json.loads((path / "manifest" / "zarr.json").read_text())["attributes"]
    [table] = re.findall(r"\| attribute \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    named = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name.strip(" `") for cell in named for name in cell.split(",")} == set(attributes)
    crc = attributes.pop("crc32c")
    assert crc == f"{google_crc32c.value(json.dumps(attributes, sort_keys=True, indent=1).encode()):08x}"
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    del files["manifest/zarr.json"]
    assert {name: entry[:2] for name, entry in attributes["files"].items()} == {
        name: [file.stat().st_size, f"{google_crc32c.value(file.read_bytes()):08x}"] for name, file in files.items()
    }
    for name, (_, _, *digest) in attributes["files"].items():
        if name.endswith("zarr.json"):
            assert digest == []
        else:  # these are small: one chunk a file, so no index
            assert digest == [xxhash.xxh3_128_hexdigest(files[name].read_bytes())]

"""A run's checkpoint as a folder: what `transformers` loads by itself, and what mfdist loads back."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState
from mfdist.config import parse_config
from mfdist.errors import CheckpointError, ConfigError
from mfdist.hugging_face import export_step, load_folder
from mfdist.training.checkpointed import load_run_model
from mfdist.training.data.tokenizer import load_tokenizer
from mfdist.training.loop import train
from mfdist.training.run import RunDirectory
from tests.training.conftest import TINY, write_text

ROOT = Path(__file__).parents[2]
TEXT = "The row looks up. Übung\n"

#: A process that has never heard of mfdist: what it finds is in the folder.
STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
written = writer(text, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
ids = tokenizer(text)
batch = tokenizer([text, text[:5]], padding=True, return_tensors="pt")
out = model.generate(**batch, max_new_tokens=3)
print(json.dumps({
    "class": type(model).__name__, "ids": ids["input_ids"], "text": tokenizer.decode(ids["input_ids"]),
    "keys": sorted(ids), "end": tokenizer.eos_token_id, "written": written, "shape": list(out.shape),
}))
"""


@pytest.fixture(scope="module", params=["memory", "dense"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_text(folder / "text", num_files=6)
    # The twin's tokens are bytes.
    other = {"memory": ["data.tokenizer=bpe", "data.vocab_size=300"], "dense": ["model.kind=dense"]}[request.param]
    text = TINY.format(source=folder / "text", cache=folder / "cache")
    config = parse_config(text, origin="TINY", overrides=["training.steps=3", *other])
    made = RunDirectory.create(folder / "run", config)
    train(made)
    return made


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "folder"
    export_step(run.checkpoints.steps()[-1].path, target, load_tokenizer(run.tokenizer_path), max_file_bytes=50_000)
    return target


def greedy(model, ids, count):
    ids = torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[0].tolist()


def test_a_process_that_knows_nothing_of_mfdist_loads_it_and_writes(run, exported, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "mfdist").symlink_to(ROOT / "mfdist")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(exported), TEXT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer, (model, _) = load_tokenizer(run.tokenizer_path), load_run_model(run)
    is_dense = run.config.model.kind == "dense"
    assert found["class"] == ("GPTNeoXForCausalLM" if is_dense else "MemoryFormerForCausalLM")
    ids = tokenizer.encode(TEXT)
    assert (found["ids"], found["text"], found["end"]) == (ids, TEXT, tokenizer.end_of_document)
    assert found["keys"] == ["attention_mask", "input_ids"]
    assert found["shape"] == [2, len(ids) + 3]
    assert found["written"] == tokenizer.decode(greedy(model, ids, 12)[len(ids) :])


def test_it_comes_back_as_it_was_its_tables_mapped(run, exported):
    loaded, (model, _) = load_folder(exported), load_run_model(run)
    assert type(loaded.model) is type(model)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in loaded.model.named_parameters())
    assert loaded.tokenizer is not None and loaded.tokenizer.decode(loaded.tokenizer.encode(TEXT)) == TEXT
    assert len(list(exported.glob("*.safetensors"))) > 1


def test_an_export_overwrites_nothing_and_needs_a_runs_step(run, exported, tmp_path):
    step = run.checkpoints.steps()[-1].path
    with pytest.raises(ConfigError, match="goes to a new or empty folder"):
        export_step(step, exported, None)
    state = CheckpointState(step=1, tables={}, dense={"model/x": torch.ones(2)}, attributes={})
    other = CheckpointDirectory(tmp_path / "other").save(state)
    with pytest.raises(CheckpointError, match=r"needs a run's checkpoint; .* was not written by `mfdist train`"):
        export_step(other.path, tmp_path / "out", None)


def test_tables_that_servers_saved_are_taken_from_their_own_step(run, exported, tmp_path):
    state = run.checkpoints.load()
    ranks = CheckpointDirectory(tmp_path / "ranks").save(replace(state, tables={}))
    served = CheckpointDirectory(tmp_path / "served").save(replace(state, dense={}, attributes={}))
    if state.tables:
        with pytest.raises(
            CheckpointError, match=r"must hold all parameters of its model; blocks\.0\.qkv\.table\.weight"
        ):
            export_step(ranks.path, tmp_path / "lacking", None)
    export_step(ranks.path, tmp_path / "out", None, tables=served.path)
    found, expected = (dict(load_folder(folder).model.named_parameters()) for folder in (tmp_path / "out", exported))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())

"""`lm_eval --model hf` on an exported run and a local task: its figures are those of our own model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from mfdist.config import parse_config
from mfdist.hugging_face import export_step
from mfdist.training.checkpointed import load_run_model
from mfdist.training.data.tokenizer import load_tokenizer
from mfdist.training.loop import train
from mfdist.training.run import RunDirectory
from tests.training.conftest import TINY, write_text

ROOT = Path(__file__).parents[2]
TASKS = {
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def nats(model, tokenizer, text, after=""):
    """Return −log p of a text after another one, by our own model."""
    start = [tokenizer.end_of_document, *tokenizer.encode(after)] if not after else tokenizer.encode(after)
    ids = torch.tensor([*start, *tokenizer.encode(text)])
    with torch.inference_mode():
        losses = cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
    return losses[len(start) - 1 :].sum().item()


@pytest.mark.slow
def test_its_figures_are_those_of_our_model(tmp_path):
    pytest.importorskip("lm_eval", reason="the harness brings 40 packages; pip install lm_eval[hf]")
    write_text(tmp_path / "text")
    run = RunDirectory.create(
        tmp_path / "run", parse_config(TINY.format(source=tmp_path / "text", cache=tmp_path / "cache"), origin="TINY")
    )
    train(run)
    tokenizer, (model, _) = load_tokenizer(run.tokenizer_path), load_run_model(run)
    export_step(run.checkpoints.steps()[-1].path, tmp_path / "model", tokenizer)
    (tmp_path / "tasks").mkdir()
    texts = ["The row looks up the table.", "Memory adds bits.", "Then the code sums a score."]
    rows = [{"text": text, "choices": [" the", " qzx"]} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        task = {"task": name, "test_split": "test", **files, **fields}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML too

    (tmp_path / "mfdist").symlink_to(ROOT / "mfdist")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(tmp_path)}
    command = f"-m lm_eval --model hf --model_args pretrained={tmp_path / 'model'},trust_remote_code=True --tasks"
    arguments = [*command.split(), ",".join(TASKS), "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *arguments, "--output_path", str(tmp_path / "found.json")],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("found*.json")
    results = json.loads(file.read_text())["results"]

    whole = sum(nats(model, tokenizer, text) for text in texts)
    expected = whole / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    is_right = [nats(model, tokenizer, " the", text) < nats(model, tokenizer, " qzx", text) for text in texts]
    assert results["choice"]["acc,none"] == pytest.approx(sum(is_right) / len(is_right))

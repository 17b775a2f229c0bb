"""The metrics file across interruptions, and TensorBoard."""

import json
import sys

import pytest

from mfdist.errors import CheckpointError, ConfigError
from mfdist.training.events import Diagnosed, Evaluated, Preparing, Stepped
from mfdist.training.layer_use import LayerUse
from mfdist.training.metrics import MetricsFile, TensorBoard, read_metrics


def stepped(step, loss=1.0):
    return Stepped(
        step=step,
        loss=loss,
        dense_lr=0.1,
        table_lr=0.3,
        dense_grad_norm=1.0,
        table_grad_norm=2.0,
        tokens_per_s=100.0,
        step_s=0.5,
        peak_memory_bytes=7,
        lookup_share=None,
    )


def test_lines_after_the_step_gone_on_from_are_dropped_and_torn_ones_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first(stepped(step))
    first(Preparing(activity="x", done=0, total=1, unit="y"))
    first.close()
    with path.open("a") as file:
        file.write('{"event": "stepped", "step": 4, "lo')  # what a kill leaves
        file.write("\0\0\0\n" + '{"event": "stepped", "step": 5}\n')  # and what a power cut may
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    second = MetricsFile(path, 2)
    second(stepped(3, loss=9.0))
    second.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path, "stepped")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 9.0),
    ]
    assert all(json.loads(line)["event"] == "stepped" for line in path.read_text().splitlines())


def test_a_full_disk_is_named_and_loses_nothing_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file(stepped(1))
    file.close()
    file._file = open("/dev/full", "w")  # noqa: SIM115, PTH123
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl failed \(No space left on device\); committed steps are intact"
    ):
        file(stepped(2))
    file.close()
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_tensorboard_holds_the_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    board(stepped(1, loss=2.5))
    board(Evaluated(step=1, loss=2.0, bits_per_byte=1.5, num_tokens=9, is_final=False))
    use = LayerUse(
        name="blocks.0.qkv",
        num_tables=2,
        bits=4,
        code_entropy=3.5,
        least_code_entropy=3.0,
        even_code_entropy=4.0,
        constant_bits=0.0,
        dead_share=0.25,
        even_dead_share=0.0,
        hottest_share=0.5,
        scores=(0.1, 0.2, 0.3, 0.4, 0.5),
        movement=None,
        unmoved_share=None,
    )
    board(Diagnosed(step=1, num_tokens=9, layers=(use,), elapsed_s=0.0))
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert events.Scalars("validation/bits_per_byte")[0].value == 1.5
    assert events.Scalars("tables/dead_share/blocks.0.qkv")[0].value == 0.25
    assert "train/lookup_share" not in events.Tags()["scalars"]


def test_tensorboard_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'mfdist\[tensorboard\]'"):
        TensorBoard(tmp_path)

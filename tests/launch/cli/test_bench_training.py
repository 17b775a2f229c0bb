"""`mfdist bench training`: real steps of both models, timed, taken apart and checked."""

import json

import pytest

from mfdist.benchmarks.training import CONTENDERS, TrainingSpeed
from mfdist.config import load_config
from mfdist.launch.cli.bench_training import _line as line_of

from .conftest import TINY


def test_models_are_timed_beside_their_twin(mfdist, tmp_path):
    file = tmp_path / "found.json"
    code, out, err = mfdist(
        "bench", "training", TINY, "--steps", "3", "--device", "cpu", "--at-least", "0.001", "--json", file
    )
    assert (code, err) == (0, "")
    assert all(line.startswith(name) for line, name in zip(out.splitlines()[2:], CONTENDERS, strict=True))
    twin, memory, narrow, in_bytes = json.loads(file.read_text("utf-8"))["results"]
    assert twin["table_bytes"] is None and "lookups" not in twin["shares"]
    assert memory["shares"]["lookups"] > 0
    assert memory["table_bytes"] == 16.0  # fp32: rows, gradient, two moments
    assert 2.0 < narrow["table_bytes"] < 4.0
    assert in_bytes["table_bytes"] == 4.0
    for each in (twin, memory, narrow, in_bytes):
        assert sum(each["shares"].values()) == pytest.approx(1.0)
        assert each["last_loss"] < each["first_loss"]
        assert each["spread"] >= 0
    assert memory["ratio"] == pytest.approx(memory["tokens_per_s"] / twin["tokens_per_s"])


def test_too_slow_is_a_failure(mfdist):
    code, _, err = mfdist("bench", "training", TINY, "--steps", "1", "--device", "cpu", "--at-least", "1000")
    assert code == 1
    assert "must train at 1000 of its twin's speed; got" in err


def test_a_contender_is_what_it_is_called(mfdist, tmp_path):
    for contender, changes in CONTENDERS.items():
        settings = [f"{key}={value}" for key, value in {"model.kind": "dense", **changes}.items()]
        assert load_config(TINY, settings).model.kind == ("dense" if contender == "dense twin" else "memory")


def test_what_one_contender_cannot_follow_is_told_before_any_is_measured(mfdist):
    code, out, err = mfdist("bench", "training", TINY, "--device", "cpu", "--set", "training.micro_batches=2")
    assert code == 2 and "training.micro_batches must be 1 where tables are fused" in err
    assert "dense twin" not in out


def test_what_does_not_fit_has_a_note_and_is_not_wrong():
    speed = TrainingSpeed(contender="MemoryFormer", note="needs more memory than there is")
    assert not speed.is_wrong
    assert line_of(speed).split("  ")[-1].strip() == "needs more memory than there is"


@pytest.mark.parametrize("last", [2.0, 1.0, float("nan")])
def test_a_loss_that_does_not_fall_is_wrong(last):
    made = dict.fromkeys(("step_s", "tokens_per_s", "ratio"), 1.0)
    speed = TrainingSpeed(
        contender="x", peak_memory_bytes=None, table_bytes=None, shares={}, first_loss=1.0, last_loss=last, **made
    )
    assert speed.is_wrong

"""SIGKILL at random moments: a real training process dies, and the resumed run tells the same loss curve."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mfdist.config import parse_config
from mfdist.training.loop import train
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory

#: For each kill as many as two commits and a resumption take at most.
STEPS_A_KILL = 20


def curve(run):
    return [(record["step"], record["loss"]) for record in read_metrics(run.metrics_path, "stepped")]


def start(run):
    command = [sys.executable, "-c", "from mfdist.launch.cli import main; main()", "train", "--resume", str(run.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_progress(run, process, num_starts, committed, num_steps, deadline_s=150):
    """Wait until start number `num_starts` is so many steps past the last commit.

    Every other start is left alone until it has committed a step after the last, or a slow disk would go nowhere.
    """
    end = time.monotonic() + deadline_s
    while process.poll() is None and time.monotonic() < end:
        records = list(read_metrics(run.metrics_path))
        starts = [place for place, record in enumerate(records) if record["event"] == "started"]
        is_ahead = num_starts % 2 or max((info.step for info in run.checkpoints.steps()), default=0) > committed
        if len(starts) == num_starts and is_ahead:
            told = [record["step"] for record in records[starts[-1] :] if record["event"] == "stepped"]
            if told and told[-1] >= committed + num_steps:
                return
        time.sleep(0.01)
    assert process.poll() is not None or time.monotonic() < end, "the resumed process made no step within its deadline"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_wanted", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_and_the_same_losses(tmp_path, tiny_config, num_wanted):
    num_steps = STEPS_A_KILL * num_wanted
    config = parse_config(
        tiny_config.to_toml(),
        origin="test",
        overrides=[f"training.steps={num_steps}", "training.eval_every=50", "checkpoint.every=50"],
    )
    whole, killed = (RunDirectory.create(tmp_path / name, config) for name in ("whole", "killed"))
    train(whole)
    killed.write_config(killed.config_with(["checkpoint.every=2"]))  # when a run saves must not show in its losses
    chance = random.Random(int(os.environ.get("MFDIST_TEST_SEED", "0")))
    num_kills, resumed_at = 0, []
    while num_kills < num_wanted:
        process = start(killed)
        steps = killed.checkpoints.steps()
        last = steps[-1].step if steps else 0
        resumed_at.append(last)
        wait_for_progress(killed, process, num_kills + 1, last, chance.randrange(1, 8))
        time.sleep(chance.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        if process.returncode == 0:
            break  # it reached the end first: fewer kills than asked, checked below
        assert process.returncode == -signal.SIGKILL, errors
        num_kills += 1
        if steps := killed.checkpoints.steps():
            assert killed.checkpoints.verify(steps[-1].step) == []
    assert num_kills == num_wanted, f"the run ended after {num_kills} kills; give it more steps"
    assert len(set(resumed_at)) >= 5, resumed_at  # the kills fell between different commits, and some during a save
    killed.write_config(killed.config_with(["checkpoint.every=50"]))
    train(killed)
    assert curve(killed) == curve(whole)
    final = [read_metrics(run.metrics_path, "evaluated")[-1] for run in (whole, killed)]
    assert final[0]["loss"] == final[1]["loss"] and final[0]["step"] == num_steps

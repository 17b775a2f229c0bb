"""`mfdist launch` and its fellows, asked for what cannot be: one line, the right exit code, nothing begun."""

import shutil
import socket

import pytest

from mfdist.launch.holding import Holding
from tests.launch.cli.conftest import TINY

pytest.importorskip("ray")

ADAM = ("--set", "optimizer.tables.rule=adam")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "launch needs a configuration or a run"),
        (["dmeo"], 'did you mean "demo"?'),
        ([TINY, "--resume", "x"], "--resume goes on with a run in its own folder"),
        ([TINY, "--trainers", "3"], "got batch_size=4, 3 trainers, micro_batches=1"),
        ([TINY, "--servers", "1"], "rows on servers are trained there, by a row optimiser"),
        ([TINY, "--servers", "1", "--set", "model.kind=dense"], "table servers need a MemoryFormer"),
        ([TINY, *ADAM, "--set", 'servers.addresses=["127.0.0.1:1"]'], "starts the table servers itself"),
        ([TINY, "--trainers", "2", "--set", "launch.elastic.min=3"], "elastic.min must be at most trainers"),
        ([TINY, "--trainers", "4", "--set", "launch.cpus=1000"], "each trainer needs 1000 CPUs; 4 trainers were asked"),
        ([TINY, "--address", "nowhere"], "--address must be auto or HOST:PORT"),
        ([TINY, "--set", "launch.trainer=2"], 'did you mean "launch.trainers"?'),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(mfdist, tmp_path, arguments, message):
    out = [] if "--resume" in arguments or not arguments else ["--out", tmp_path / "run"]
    code, _, err = mfdist("launch", *arguments, *out)
    assert code == 2
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_address_where_nobody_listens_is_unavailable(mfdist, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    code, _, err = mfdist("launch", TINY, "--out", tmp_path / "run", "--address", address)
    assert code == 1
    assert f"a Ray cluster must be reachable at {address}; Connection refused" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["status", "RUN"], ["attach", "RUN"], ["stop", "RUN"], ["scale", "RUN", "--trainers", "2"], ["logs", "RUN", "x"]],
    ids=lambda arguments: arguments[0],
)
def test_a_run_that_was_never_launched_is_told_so(mfdist, tmp_path, arguments):
    code, _, err = mfdist(*[tmp_path if argument == "RUN" else argument for argument in arguments])
    assert code == 2
    assert "must be the folder of a launched run" in err


def test_a_run_of_a_live_job_is_not_launched_twice(mfdist, tmp_path):
    (tmp_path / "run" / "launch").mkdir(parents=True)
    holding = Holding(tmp_path / "run" / "launch")
    try:
        code, _, err = mfdist("launch", TINY, "--out", tmp_path / "run")
    finally:
        holding.release()
    assert code == 1
    assert "belongs to a live job" in err and f"mfdist attach {tmp_path / 'run'}" in err


def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(mfdist, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    shutil.move(run / "checkpoints", tmp_path / "away")
    for verb in ("train", "launch"):
        code, out, err = mfdist(verb, "--resume", run)
        assert code == 1 and "starting a local Ray" not in out
        assert f"{run / 'checkpoints'} holds none, and {run / 'metrics.jsonl'} tells of one of step 12" in err
        assert err.count("\n") == 1
    assert not (run / "checkpoints").exists()


def test_a_folder_with_checkpoints_alone_is_a_run(mfdist, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("metrics.jsonl"))
    code, out, err = mfdist("launch", TINY, "--out", run)
    assert code == 2 and "starting a local Ray" not in out
    assert "holds a run already" in err

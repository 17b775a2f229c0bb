"""Where a run goes on, also when its checkpoints or its metrics are gone, and what is suggested for that."""

import shutil

import pytest

from mfdist.checkpoint.conversion import export_step, import_step
from mfdist.config import parse_config
from mfdist.errors import CheckpointError, ConfigError, UnavailableError
from mfdist.table_server.run_tables import ServedTables
from mfdist.training.checkpointed import load_run_model
from mfdist.training.events import Noted, Started, Stepped, Warned
from mfdist.training.loop import train
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory

from .conftest import TINY, write_text
from .test_loop import set_keys


def recorded(run, *overrides):
    events = []
    train(run, overrides=overrides, observer=events.append)
    return events


def said(events):
    return [event.message for event in events if isinstance(event, Noted | Warned)]


def first_step(events):
    return next(event.first_step for event in events if isinstance(event, Started))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has saved steps 4, 8 and 12; a test changes copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text")
    filled = TINY.format(source=folder / "text", cache=folder / "cache")
    config = parse_config(filled, origin="TINY", overrides=["optimizer.tables.rule=adam"])  # which servers can train
    run = RunDirectory.create(folder / "run", config)
    train(run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "copy")
    return RunDirectory.open(tmp_path / "copy")


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(run):
    """As where their volume is not mounted; once it is, the run goes on as if nothing had been."""
    place, away = run.path / "checkpoints", run.path / "away"
    before = {path: path.read_bytes() for path in run.path.glob("*.*")}
    place.rename(away)
    refusal = f"{place} holds none, and {run.metrics_path} tells of one of step 12; mount or put back that folder"
    with pytest.raises(CheckpointError, match=refusal):
        train(run)
    assert not place.exists()
    place.mkdir()
    with pytest.raises(CheckpointError, match=refusal):
        train(run)
    assert list(place.iterdir()) == []
    place.rmdir()
    place.symlink_to(run.path / "volume")
    with pytest.raises(CheckpointError, match=f"{place} is a link to {run.path / 'volume'}, which is not; mount"):
        train(run)
    place.unlink()
    place.write_text("no folder")
    with pytest.raises(CheckpointError, match=f"cannot list {place}"):
        train(run)
    assert {path: path.read_bytes() for path in run.path.glob("*.*")} == before
    place.unlink()
    place.symlink_to(away)
    events = recorded(run, "training.steps=13")
    assert first_step(events) == 12 and said(events) == []
    assert [record["step"] for record in read_metrics(run.metrics_path, "stepped")] == list(range(1, 14))


def test_a_run_whose_last_checkpoints_are_gone_says_where_it_goes_on(run):
    for info in run.checkpoints.steps():
        if info.step > 8:
            shutil.rmtree(info.path)
    events = recorded(run)
    assert first_step(events) == 8
    assert said(events) == [
        "the last checkpoint is of step 8, and the metrics tell of one of step 12; training goes on from step 8"
    ]


def test_a_run_without_metrics_goes_on_and_says_so(run):
    run.metrics_path.unlink()
    events = recorded(run, "training.steps=13")
    assert first_step(events) == 12
    assert said(events) == [f"{run.metrics_path} is missing; it begins anew at step 12"]
    assert [record["step"] for record in read_metrics(run.metrics_path, "stepped")] == [13]


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path, tiny_config):
    def dies(event):
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyboardInterrupt

    run = RunDirectory.create(tmp_path / "run", tiny_config)
    with pytest.raises(KeyboardInterrupt):
        train(run, observer=dies)
    told = read_metrics(run.metrics_path, "stepped")
    events = recorded(run, "training.steps=4")
    assert first_step(events) == 0
    assert said(events) == ["the run ended before its first checkpoint; it begins at step 0 again"]
    again = read_metrics(run.metrics_path, "stepped")
    assert [record["loss"] for record in again[: len(told)]] == [record["loss"] for record in told]


def test_servers_that_cannot_be_reached_leave_a_run_as_it_was(run):
    overrides = ["servers.addresses=['127.0.0.1:1']", "servers.deadline_s=1", "training.steps=13"]
    before = run.config_path.read_bytes()
    home = ServedTables(run.config_with(overrides))
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        train(run, overrides=overrides, table_home=home)
    home.close()
    assert run.config_path.read_bytes() == before


def test_weights_alone_are_not_trained_on(tmp_path, tiny_run):
    train(tiny_run)
    last = tiny_run.checkpoints.steps()[-1]
    export_step(last.path, tmp_path / "weights", "safetensors", has_states=False)
    import_step(tmp_path / "weights", tiny_run.checkpoints, step=last.step + 1)
    tiny_run.write_config(tiny_run.config_with([f"training.steps={last.step + 4}"]))
    with pytest.raises(CheckpointError, match=f"step {last.step + 1} holds weights alone and cannot be trained on; de"):
        train(tiny_run)


def test_commands_that_are_suggested_can_be_pasted(tmp_path, tiny_config):
    path = tmp_path / "my run"
    with pytest.raises(ConfigError, match=rf"start one by `mfdist train demo --out '{path}'`"):
        RunDirectory.open(path)
    run = RunDirectory.create(path, set_keys(tiny_config, "training.steps=1"))
    with pytest.raises(CheckpointError, match=rf"train on by `mfdist train --resume '{path}'`"):
        load_run_model(run)
    train(run)
    with pytest.raises(ConfigError, match=rf"go on with it by `mfdist train --resume '{path}'`"):
        RunDirectory.create(path, tiny_config)

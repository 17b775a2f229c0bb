"""`mfdist train` over several ranks: the losses of one process, the same bits each time, and one voice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfdist.config import RunConfig
from mfdist.sharding.plan import ShardingPlan
from mfdist.testing.run_ranks import RankFailedError, RankPool
from mfdist.training.loop import train
from mfdist.training.run import RunDirectory
from tests.training import world_ranks as ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pool():
    with RankPool() as made:
        yield made


def with_settings(config, **sections):
    """Return the configuration with sections replaced."""
    settings = config.model_dump(mode="json", exclude_none=True)
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return RunConfig.model_validate(settings)


def metrics(path, kind, key="loss"):
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [event[key] for event in events if event["event"] == kind]


CASES = [
    ("column_wise", 2, "adamw"),
    ("row_wise", 2, "rowwise_adagrad"),
    ("table_wise", 4, "adam"),
    ("auto", 2, "adamw"),
]


@pytest.mark.parametrize(("kind", "world_size", "rule"), CASES)
def test_losses_are_those_of_one_process_and_repeat(pool, tmp_path, tiny_config, kind, world_size, rule):
    sections = {"optimizer": {"tables": {"rule": rule}}, "sharding": {"kind": kind}}
    config = with_settings(tiny_config, **sections)
    train(RunDirectory.create(tmp_path / "alone", config))
    for name in ("ranks", "again"):
        RunDirectory.create(tmp_path / name, config)
        done = pool.run(ranks.trained, world_size, tmp_path / name, timeout_s=150)
        assert all(outcome[:2] == (12, "finished") for outcome in done)
        assert "Stepped" in done[0][2] and not any(told for _, _, told in done[1:])
    for kind_of_event in ("stepped", "evaluated"):
        expected = metrics(tmp_path / "alone", kind_of_event)
        assert metrics(tmp_path / "ranks", kind_of_event) == pytest.approx(expected, rel=1e-4)
        assert metrics(tmp_path / "again", kind_of_event) == metrics(tmp_path / "ranks", kind_of_event)
    for norm in ("dense_grad_norm", *(["table_grad_norm"] if rule == "adamw" else [])):  # fused tables have none
        expected = metrics(tmp_path / "alone", "stepped", norm)
        assert metrics(tmp_path / "ranks", "stepped", norm) == pytest.approx(expected, rel=1e-3)
    assert metrics(tmp_path / "ranks", "sampled", "text") == metrics(tmp_path / "again", "sampled", "text")
    assert_used_alike(*(metrics(tmp_path / name, "diagnosed", "layers") for name in ("alone", "ranks")))
    plan = ShardingPlan.from_json((tmp_path / "ranks" / "plan.json").read_text())
    assert plan.world_size == world_size and len(plan.tables) == 6


def assert_used_alike(alone, ranks):
    """Compare how rows are used: all ranks' tokens are counted, and rows are found wherever they lie."""
    assert len(alone) == len(ranks) == 3
    for ours, theirs in zip(alone, ranks, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one["name"] == other["name"] and one["even_code_entropy"] == other["even_code_entropy"]
            for figure in ("code_entropy", "dead_share", "hottest_share"):  # a sign near zero may be rounded away
                assert other[figure] == pytest.approx(one[figure], abs=0.03)
            assert other["movement"] == pytest.approx(one["movement"], rel=1e-3)


def test_micro_batches_are_averaged_once(pool, tmp_path, tiny_config):
    train(RunDirectory.create(tmp_path / "alone", tiny_config))
    RunDirectory.create(tmp_path / "ranks", with_settings(tiny_config, training={"micro_batches": 2}))
    pool.run(ranks.trained, 2, tmp_path / "ranks", timeout_s=150)
    expected = metrics(tmp_path / "alone", "stepped")
    assert metrics(tmp_path / "ranks", "stepped") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rule", ["adamw", "rowwise_adagrad"])
def test_a_run_goes_on_under_another_number_of_ranks_and_another_plan(pool, tmp_path, tiny_config, rule):
    config = with_settings(tiny_config, optimizer={"tables": {"rule": rule}})
    for name in ("alone", "moved"):
        RunDirectory.create(tmp_path / name, config)
    pool.run(ranks.trained, 4, tmp_path / "moved", "training.steps=4", "sharding.kind=row_wise", timeout_s=150)
    columns = ("training.steps=8", "sharding.kind=column_wise", "sharding.peer_memory=false")
    pool.run(ranks.trained, 2, tmp_path / "moved", *columns, timeout_s=150)
    train(RunDirectory.open(tmp_path / "moved"), overrides=["training.steps=12"])
    for steps in (4, 8, 12):
        train(RunDirectory.open(tmp_path / "alone"), overrides=[f"training.steps={steps}"])
    assert metrics(tmp_path / "moved", "started", "first_step") == [0, 4, 8]
    expected = metrics(tmp_path / "alone", "stepped")
    assert metrics(tmp_path / "moved", "stepped") == pytest.approx(expected, rel=1e-4) and len(expected) == 12


def test_one_rank_asked_to_stop_stops_all_after_one_step(pool, tmp_path, tiny_config):
    RunDirectory.create(tmp_path / "run", with_settings(tiny_config, training={"steps": 100_000}))
    outcomes = pool.run(ranks.stopped_by_one, 2, tmp_path / "run", timeout_s=120)
    assert outcomes[0][:2] == outcomes[1][:2]
    assert outcomes[0][1] == "SIGTERM on rank 1" and outcomes[0][0] < 100_000
    assert RunDirectory.open(tmp_path / "run").checkpoints.steps()[-1].step == outcomes[0][0]


def test_a_batch_that_does_not_divide_among_ranks_is_refused(pool, tmp_path, tiny_config):
    RunDirectory.create(tmp_path / "run", tiny_config)
    with pytest.raises(RankFailedError, match="must be a multiple of ranks × micro_batches; got batch_size=4, 3 ranks"):
        pool.run(ranks.trained, 3, tmp_path / "run")


@pytest.mark.parametrize(("kind", "world_size"), [("column_wise", 2), ("grid", 4), ("row_wise", 2), ("replicated", 2)])
@pytest.mark.parametrize("rule", ["rowwise_adagrad", "adam"])
def test_unfused_tables_are_trained_as_those_of_one_process(pool, kind, world_size, rule):
    for distance, moved in pool.run(ranks.unfused, world_size, kind, rule):
        assert distance < 1e-5 < 1e-2 < moved


def test_under_torchrun_one_rank_speaks(tmp_path, tiny_config):
    (tmp_path / "config.toml").write_text(tiny_config.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mfdist"]
    command += ["train", str(tmp_path / "config.toml"), "--out", str(tmp_path / "run"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reason"] == "finished"
    assert (
        done.stderr.count("step 12/12") == 1
        and "each: CPU, 1 thread; they can write into each other's memory\n" in done.stderr
    )
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 1 and "mfdist: " in refused.stderr

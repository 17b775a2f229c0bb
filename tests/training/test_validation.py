"""Diagnosis of tables while a run trains: what is told, what is kept, and the warning when hashing collapses."""

import json

import pytest

from mfdist.config import parse_config
from mfdist.training.collapse import collapse_message
from mfdist.training.events import Diagnosed, Evaluated, Warned
from mfdist.training.layer_use import LayerUse
from mfdist.training.loop import train
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory


def trained(folder, config, *overrides):
    """Train a new run; return it and what it told."""
    events = []
    run = RunDirectory.create(folder, parse_config(config.to_toml(), origin="test", overrides=overrides))
    train(run, observer=events.append)
    return run, events


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def test_every_validation_is_diagnosed_and_the_last_one_kept_in_detail(tmp_path, tiny_config):
    run, events = trained(tmp_path / "run", tiny_config)
    diagnosed = of(Diagnosed, events)
    assert [event.step for event in diagnosed] == [event.step for event in of(Evaluated, events)] == [5, 10, 12]
    names = [f"blocks.{block}.{part}" for block in (0, 1) for part in ("qkv", "ffn1", "ffn2")]
    for event in diagnosed:
        assert [use.name for use in event.layers] == names
        assert all(0 < use.evenness <= 1.01 and 0 <= use.dead_share < 1 for use in event.layers)
    assert diagnosed[0].num_tokens == of(Evaluated, events)[0].num_tokens == 8 * 32
    moved = [event.layers[0].movement[2] for event in diagnosed]
    assert 0 < moved[0] < moved[1]
    assert not of(Warned, events)
    written = read_metrics(run.metrics_path, "diagnosed")
    assert [record["layers"][5]["dead_share"] for record in written] == [e.layers[5].dead_share for e in diagnosed]
    detail = json.loads(run.table_use_path.read_text())
    assert (detail["version"], detail["step"], detail["num_tokens"]) == (1, 12, diagnosed[-1].num_tokens)
    assert [layer["name"] for layer in detail["layers"]] == names


def test_training_is_the_same_whether_or_not_rows_are_looked_at(tmp_path, tiny_config):
    """Diagnosis draws no random numbers of the run's and changes no row."""
    _, often = trained(tmp_path / "often", tiny_config, "training.eval_every=1")
    _, seldom = trained(tmp_path / "seldom", tiny_config, "training.eval_every=100")
    assert of(Evaluated, often)[-1].loss == of(Evaluated, seldom)[-1].loss


def test_a_resumed_run_measures_from_the_same_first_rows_if_it_can_draw_them_again(tmp_path, tiny_config):
    run, first = trained(tmp_path / "run", tiny_config)
    expected = of(Diagnosed, first)[-1].layers[0].movement
    events = []
    train(run, overrides=["training.steps=13"], observer=events.append)
    resumed = of(Diagnosed, events)[-1].layers[0].movement
    assert resumed == pytest.approx(expected, rel=0.1) and resumed != expected
    # Another kind of device draws other rows from the same seed.
    run.metrics_path.write_text(run.metrics_path.read_text().replace('"device_type": "cpu"', '"device_type": "cuda"'))
    train(run, overrides=["training.steps=14"], observer=events.append)
    assert {use.movement for use in of(Diagnosed, events)[-1].layers} == {None}


def test_a_dense_model_has_nothing_to_diagnose(tmp_path, tiny_config):
    run, events = trained(tmp_path / "run", tiny_config, "model.kind=dense")
    assert not of(Diagnosed, events) and not run.table_use_path.exists()


def test_a_rate_that_is_far_too_high_collapses_the_hashing_and_the_warning_says_so(tmp_path, tiny_config):
    overrides = ("training.steps=30", "training.eval_every=10", "optimizer.dense.lr=1.0")
    _, events = trained(tmp_path / "run", tiny_config, *overrides)
    use = min(of(Diagnosed, events)[-1].layers, key=lambda use: use.evenness)
    assert use.evenness < 0.05 and use.constant_bits > 0.9 and use.dead_share > 0.9
    messages = [event.message for event in of(Warned, events)]
    assert messages and messages[0].startswith("a memory layer must hash tokens apart; after step 10 blocks.")
    assert "usually a lower optimizer.dense.lr" in messages[0] and "\n" not in messages[0]
    # Each layer is warned of once.
    collapsed = {use.name for event in of(Diagnosed, events) for use in event.layers if use.has_collapsed}
    assert len(messages) <= len(collapsed)


@pytest.mark.parametrize(
    ("median", "cause"), [(0.97, "scores are near 1"), (0.0045, "close to zero"), (0.2, "the same signs for most")]
)
def test_the_warning_tells_causes_apart(median, cause):
    use = LayerUse(
        name="blocks.0.ffn2",
        num_tables=16,
        bits=8,
        code_entropy=0.3,
        least_code_entropy=0.0,
        even_code_entropy=7.9,
        constant_bits=0.9,
        dead_share=0.97,
        even_dead_share=0.0,
        hottest_share=1.0,
        scores=(median / 2, median / 1.5, median, median * 1.01, median * 1.02),
        movement=None,
        unmoved_share=None,
    )
    message = collapse_message([use], 7)
    assert cause in message and "carry 0.3 of 7.9 bits, 90% of their bits" in message

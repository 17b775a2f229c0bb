"""Training end to end on a tiny run: learning, resuming to the same bits, stopping, and what is told on the way."""

import math
import os
import signal
import threading

import pytest
import torch

from mfdist.config import parse_config
from mfdist.errors import (
    CheckpointError,
    ConfigError,
    ConsistencyError,
    DataError,
    MfdistError,
    NonFiniteError,
    UnavailableError,
)
from mfdist.layers import MemoryLayer
from mfdist.models import build_model
from mfdist.training.data.token_store import prepare_tokens
from mfdist.training.evaluation import evaluate, evaluate_run
from mfdist.training.events import Evaluated, Sampled, Saved, Started, Stepped, Stopped, TwinTimed, Warned, ignore
from mfdist.training.generation import GenerationConfig, load_generator
from mfdist.training.loop import train
from mfdist.training.metrics import read_metrics
from mfdist.training.profile import time_shares
from mfdist.training.run import RunDirectory

from .conftest import write_text


def set_keys(config, *overrides):
    return parse_config(config.to_toml(), origin="test", overrides=overrides)


def recorded(run, *overrides):
    events = []
    train(run, overrides=overrides, observer=events.append)
    return events


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def losses(events):
    return [(event.step, event.loss) for event in of(Stepped, events)]


def test_a_run_learns_and_tells_its_story_in_order(tmp_path, tiny_config):
    config = set_keys(tiny_config, "training.steps=60", "training.sample_prompt=the ", "checkpoint.every=25")
    run = RunDirectory.create(tmp_path / "run", config)
    events = recorded(run)
    kinds = [type(event) for event in events if type(event).__name__ != "Preparing"]
    assert kinds[0] is Started and kinds[-1] is Stopped and kinds[-2] is Sampled
    assert [step for step, _ in losses(events)] == list(range(1, 61))
    assert [event.step for event in of(Saved, events)] == [25, 50, 60]
    assert [event.step for event in of(Evaluated, events)] == [*range(5, 60, 5), 60]
    final = of(Evaluated, events)[-1]
    assert final.is_final and final.bits_per_byte < of(Started, events)[0].baselines_bits_per_byte["byte unigram"]
    assert of(Evaluated, events)[0].loss > final.loss + 0.5
    assert len(of(Sampled, events)[0].text) > 0
    stopped = of(Stopped, events)[0]
    assert (stopped.step, stopped.last_step, stopped.reason) == (60, 60, "finished")
    shares = [event.lookup_share for event in of(Stepped, events) if event.lookup_share is not None]
    assert shares and all(0 < share < 1 for share in shares)
    assert [info.step for info in run.checkpoints.steps()] == [50, 60]
    assert parse_config(run.config_path.read_text(), origin="run").model.vocab_size == 257
    written = read_metrics(run.metrics_path, "stepped")
    assert [(record["step"], record["loss"]) for record in written] == losses(events)


def test_a_run_without_checkpoints_saves_nothing(tmp_path, tiny_config):
    run = RunDirectory.create(tmp_path / "run", set_keys(tiny_config, "checkpoint.every=0"))
    events = recorded(run)
    stopped = of(Stopped, events)[0]
    assert (stopped.reason, stopped.is_saved) == ("finished", False) and not of(Saved, events)
    assert not run.checkpoints.steps()


def test_evaluating_a_run_gives_the_final_score_again(tiny_run):
    events = recorded(tiny_run)
    final = of(Evaluated, events)[-1]
    report = evaluate_run(tiny_run)
    assert (report.step, report.loss, report.bits_per_byte) == (12, final.loss, final.bits_per_byte)
    assert report.num_tokens == final.num_tokens
    assert evaluate_run(tiny_run, step=8).loss != report.loss


@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_a_resumed_run_has_the_same_losses_and_weights_to_the_bit(tmp_path, tiny_config, kind):
    config = set_keys(tiny_config, f"model.kind={kind}", "training.micro_batches=2", "checkpoint.keep_last=9")
    whole = RunDirectory.create(tmp_path / "whole", config)
    expected = recorded(whole)
    parts = RunDirectory.create(tmp_path / "parts", config)
    interrupted: list[object] = []

    def interrupt(event):
        interrupted.append(event)
        if isinstance(event, Stepped) and event.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(parts, observer=interrupt)
    assert (stopped.step, stopped.reason) == (6, "SIGTERM")
    assert of(Warned, interrupted)[0].message.startswith("SIGTERM: stopping after this step and saving")
    torch.manual_seed(99)  # whatever the process did in between
    resumed = recorded(parts)
    assert of(Started, resumed)[0].first_step == 6
    assert losses(interrupted) + losses(resumed) == losses(expected)
    assert of(Evaluated, resumed)[-1].loss == of(Evaluated, expected)[-1].loss
    a, b = (run.checkpoints.load(12) for run in (whole, parts))
    for name, table in a.tables.items():
        other = b.tables[name]
        assert torch.equal(table.weight, other.weight)
        assert all(torch.equal(value, other.optimizer[moment]) for moment, value in table.optimizer.items())
    assert a.dense.keys() == b.dense.keys() and all(
        torch.equal(value, b.dense[name]) for name, value in a.dense.items()
    )
    assert [r["step"] for r in read_metrics(parts.metrics_path, "stepped")] == list(range(1, 13))


def test_going_on_after_the_last_step_needs_more_steps(tiny_run):
    recorded(tiny_run)
    again = recorded(tiny_run)
    assert not of(Stepped, again) and of(Stopped, again)[0].step == 12
    more = recorded(tiny_run, "training.steps=15")
    assert tiny_run.config.training.steps == 15
    with pytest.raises(ConfigError, match=r"at least the 15 steps that are done; got 14"):
        train(tiny_run, overrides=["training.steps=14"])
    assert tiny_run.config.training.steps == 15
    assert [step for step, _ in losses(more)] == [13, 14, 15]


def test_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path, tiny_config):
    curves = []
    for parts in (1, 2, 4):
        run = RunDirectory.create(tmp_path / f"run{parts}", set_keys(tiny_config, f"training.micro_batches={parts}"))
        curves.append(torch.tensor([loss for _, loss in losses(recorded(run))]))
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=2e-4, atol=0)


def test_the_seed_decides_the_run(tmp_path, tiny_config):
    curves = [
        losses(recorded(RunDirectory.create(tmp_path / str(index), set_keys(tiny_config, f"training.seed={seed}"))))
        for index, seed in enumerate((5, 5, 6))
    ]
    assert curves[0] == curves[1] != curves[2]


def test_a_loss_that_is_not_finite_names_step_and_layer_and_changes_nothing(tiny_run):
    poisoned = {}

    def poison(event):
        # The observer runs between steps, in the training thread: reach the live model through the garbage collector.
        if isinstance(event, Stepped) and event.step == 6:
            import gc

            model = next(each for each in gc.get_objects() if type(each).__name__ == "MemoryFormer" and not poisoned)
            poisoned["model"] = model
            with torch.no_grad():
                model.blocks[1].ffn1.bias[3] = torch.nan

    with pytest.raises(
        NonFiniteError, match=r"got nan at step 7, first in blocks\.1\.ffn1\.bias \(parameter\)"
    ) as caught:
        train(tiny_run, observer=poison)
    assert "\n" not in str(caught.value)
    failed = read_metrics(tiny_run.metrics_path)[-1]
    assert (failed["event"], failed["kind"], failed["message"]) == ("failed", "non_finite", str(caught.value))
    assert [info.step for info in tiny_run.checkpoints.steps()] == [4]
    assert [step for step, _ in losses(recorded(tiny_run))] == list(range(5, 13))


def test_diverging_by_a_huge_rate_is_stopped_not_trained_through(tmp_path, tiny_config):
    config = set_keys(
        tiny_config,
        "optimizer.dense.lr=1e30",
        "optimizer.tables.lr=1e30",
        "optimizer.dense.clip_norm=0",
        "training.steps=50",
    )
    with pytest.raises(NonFiniteError, match=r"must stay finite; got (nan|inf) at step \d+, first in "):
        train(RunDirectory.create(tmp_path / "run", config))


def test_changed_text_is_refused_and_leaves_the_run_as_it_was(tmp_path, tiny_config):
    config = set_keys(tiny_config, "data.tokenizer=bpe", "data.vocab_size=300")
    run = RunDirectory.create(tmp_path / "run", config)
    recorded(run)
    before = [path.read_bytes() for path in (run.config_path, run.tokenizer_path)]
    write_text(tmp_path / "text", num_files=13, seed=7)
    for refused in (lambda: train(run, overrides=["training.steps=20"]), lambda: evaluate_run(run)):
        with pytest.raises(ConsistencyError, match=r"must see the text it began with"):
            refused()
    assert [path.read_bytes() for path in (run.config_path, run.tokenizer_path)] == before


def test_text_that_moved_may_be_named_again(tmp_path, tiny_config):
    run = RunDirectory.create(tmp_path / "run", tiny_config)
    recorded(run)
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    assert of(Stopped, recorded(run, f"data.source={tmp_path / 'elsewhere'}"))[0].step == 12


def test_paths_are_stored_absolute(tmp_path, tiny_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.create(tmp_path / "run", set_keys(tiny_config, "data.source=text"))
    assert run.config.data.source == str(tmp_path / "text")


def test_a_configuration_edited_by_hand_is_compared_with_the_checkpoint(tiny_run):
    recorded(tiny_run)
    edited = tiny_run.config_path.read_text().replace('score = "paper"', 'score = "released"')
    tiny_run.config_path.write_text(edited)
    with pytest.raises(ConsistencyError, match=r"trained with model\.score='paper' and .* says 'released'"):
        train(tiny_run)


def test_bits_per_byte_of_a_uniform_guess_are_those_of_the_vocabulary(tiny_run):
    store = prepare_tokens(tiny_run.config.data, observer=ignore)
    model = build_model(tiny_run.config.model.model_copy(update={"vocab_size": 257}))
    with torch.no_grad():
        model.head.weight.zero_()
    scored = evaluate(model, store, step=0, seq_len=32)
    assert scored.num_tokens == len(store.validation) - 1
    num_bytes = sum(int(store.tokenizer.token_num_bytes[token]) for token in store.validation[1:])
    assert scored.loss == pytest.approx(math.log(257), rel=1e-5)
    assert scored.bits_per_byte == pytest.approx(math.log2(257) * scored.num_tokens / num_bytes, rel=1e-5)


def test_the_shares_of_a_steps_time_are_of_what_it_did():
    device, x = torch.device("cpu"), torch.randn(4000, 64)
    layer, linear = MemoryLayer(64, 64), torch.nn.Linear(64, 64)
    layer(x)
    assert "lookups" not in time_shares(lambda: linear(x), device)[1]
    only = time_shares(lambda: layer(x), device)[1]["lookups"]
    half = time_shares(lambda: (layer(x), [linear(x) for _ in range(200)]), device)[1]
    assert 0.5 < only <= 1.0 and 0.0 < half["lookups"] < only
    assert half["matrix products"] > 0 and sum(half.values()) == pytest.approx(1)


def test_two_processes_cannot_train_one_run(tiny_run):
    refused = []

    def compete(event):
        if isinstance(event, Stepped) and event.step == 1:

            def second():
                try:
                    train(tiny_run)
                except MfdistError as error:
                    refused.append(error)

            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    train(tiny_run, observer=compete)
    assert [error.kind for error in refused] == ["unavailable"]


def test_a_second_command_leaves_a_run_that_is_starting_alone(tmp_path, tiny_config, tiny_run):
    other = set_keys(tiny_config, "model.bits=2", "training.steps=3")
    refused = []

    def compete(event):
        if isinstance(event, Started):  # the first holds the run, and has made no step yet
            for attempt in (
                lambda: RunDirectory.create(tiny_run.path, other),
                lambda: train(tiny_run, overrides=["training.steps=3"]),
            ):
                with pytest.raises(UnavailableError) as error:
                    attempt()
                refused.append(error.value.kind)

    train(tiny_run, observer=compete)
    assert refused == ["unavailable", "unavailable"]
    assert (tiny_run.config.model.bits, tiny_run.config.training.steps) == (4, 12)


def test_what_may_change_in_a_run_and_what_may_not(tiny_run):
    for override in (
        "model.bits=2",
        "data.tokenizer=bpe",
        "training.seed=1",
        "training.batch_size=8",
        "training.seq_len=16",
    ):
        with pytest.raises(ConfigError, match="a resumed run keeps its model, data, seed and batches"):
            tiny_run.config_with([override])
    assert tiny_run.config_with(["optimizer.tables.lr=0.5"]).optimizer.tables.lr == 0.5


def test_a_run_that_never_trained_gives_way(tmp_path, tiny_config):
    (tmp_path / "empty").mkdir()
    bad = set_keys(tiny_config, f"data.source={tmp_path / 'empty'}")
    with pytest.raises(DataError, match="empty"):
        train(RunDirectory.create(tmp_path / "run", bad))
    assert RunDirectory.create(tmp_path / "run", tiny_config).config == tiny_config


def test_runs_do_not_overwrite_each_other(tmp_path, tiny_config, tiny_run):
    recorded(tiny_run)
    with pytest.raises(ConfigError, match=r"holds a run already; go on with it by `mfdist train --resume"):
        RunDirectory.create(tiny_run.path, tiny_config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds something else"):
        RunDirectory.create(tmp_path / "full", tiny_config)
    with pytest.raises(ConfigError, match=r"it has no config\.toml"):
        RunDirectory.open(tmp_path / "full")


def test_generation_streams_the_asked_number_of_tokens_and_repeats_by_seed(tiny_run):
    with pytest.raises(CheckpointError, match="no committed checkpoint yet"):
        load_generator(tiny_run) if tiny_run.tokenizer_path.exists() else evaluate_run(tiny_run)
    recorded(tiny_run)
    generator = load_generator(tiny_run)
    config = GenerationConfig(num_tokens=200, seed=3)  # three times the window of 64
    tokens = list(generator.tokens(generator.tokenizer.encode("the row"), config))
    assert len(tokens) == 200 and generator.tokenizer.end_of_document not in tokens
    assert list(generator.tokens(generator.tokenizer.encode("the row"), config)) == tokens
    assert list(generator.tokens([], GenerationConfig(num_tokens=9, seed=4))) != tokens[:9]
    assert "".join(generator.stream("", GenerationConfig(num_tokens=0))) == ""


@pytest.mark.gpu
def test_a_run_in_bf16_writes_with_weights_in_bf16_on_a_gpu(tmp_path, tiny_config):
    run = RunDirectory.create(
        tmp_path / "run", set_keys(tiny_config, "training.precision=bf16", "training.device=auto")
    )
    recorded(run)
    generator = load_generator(run)
    assert {parameter.dtype for parameter in generator.model.parameters()} == {torch.bfloat16}
    assert len(list(generator.tokens([], GenerationConfig(num_tokens=9, seed=4)))) == 9


def test_sampling_options_narrow_the_choice(tiny_run):
    recorded(tiny_run)
    generator = load_generator(tiny_run)
    prompt = generator.tokenizer.encode("the ")
    greedy = list(generator.tokens(prompt, GenerationConfig(num_tokens=8, temperature=0)))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        assert list(generator.tokens(prompt, GenerationConfig(num_tokens=8, seed=9, **narrow))) == greedy
    logits = generator.model(torch.tensor([prompt]))[0, -1]
    likely = set(logits.topk(4).indices.tolist())
    drawn = {
        next(iter(generator.tokens(prompt, GenerationConfig(num_tokens=1, seed=seed, top_k=3, temperature=5.0))))
        for seed in range(40)
    }
    assert len(drawn) > 1 and drawn <= likely
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"num_tokens": -1}):
        with pytest.raises(ConfigError, match=rf"{next(iter(bad))} must be"):
            GenerationConfig(**bad)


def test_the_dense_twin_is_timed_beside(tmp_path, tiny_config):
    run = RunDirectory.create(tmp_path / "run", set_keys(tiny_config, "training.twin_steps=3"))
    events = recorded(run)
    timed = of(TwinTimed, events)[0]
    assert of(TwinTimed, recorded(run, "training.steps=14"))[0].tokens_per_s == timed.tokens_per_s
    assert timed.num_steps == 3 and timed.tokens_per_s > 0 and timed.model_tokens_per_s > 0
    plain = RunDirectory.create(tmp_path / "plain", tiny_config)
    assert losses(recorded(plain)) == losses(events)


def test_bf16_autocast_learns_too(tmp_path, tiny_config):
    config = set_keys(tiny_config, "training.precision=bf16", "training.steps=60", "checkpoint.every=60")
    events = recorded(RunDirectory.create(tmp_path / "run", config))
    assert of(Evaluated, events)[0].loss > of(Evaluated, events)[-1].loss + 0.4


def test_checkpoints_hold_the_configuration_and_open_as_plain_arrays(tiny_run):
    zarr = pytest.importorskip("zarr")
    recorded(tiny_run)
    group = zarr.open(str(tiny_run.checkpoints.steps()[-1].path), mode="r")
    table = group["tables/blocks.0.qkv/weight"]
    assert table.shape == (8 * 16, 96)
    model = build_model(tiny_run.config.model)
    assert set(group["tables"]) == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("qkv", "ffn1", "ffn2")}
    assert sum(1 for name, _ in model.named_parameters() if "table" in name) == 6
    state = tiny_run.checkpoints.load()
    assert parse_config(state.attributes["config"], origin="checkpoint") == tiny_run.config

"""Runs whose tables a row optimiser trains, fused and not: learning, resuming to the same bits, what cannot be set."""

import pytest
import torch

from mfdist.config import DenseGroupConfig, ModelConfig, OptimizerConfig, TableGroupConfig, parse_config
from mfdist.errors import ConfigError, ConsistencyError, NonFiniteError
from mfdist.models import build_model
from mfdist.training.events import Evaluated, Started, Stepped
from mfdist.training.loop import train
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.run import RunDirectory
from mfdist.training.step import TrainStep

from .test_loop import losses, of, recorded, set_keys

TABLES = "optimizer.tables"
ADAGRAD = (f"{TABLES}.rule=rowwise_adagrad", f"{TABLES}.clip_norm=0", "model.table_dtype=bf16")
ADAM = (f"{TABLES}.rule=adam", f"{TABLES}.clip_norm=0", f"{TABLES}.state_dtype=bf16", "model.table_dtype=bf16")

IN_BYTES = (*ADAM[:2], f"{TABLES}.state_dtype=fp8", "model.table_dtype=bf16")


@pytest.mark.parametrize(
    ("keys", "precision"),
    [(ADAGRAD, "fp32"), (ADAGRAD, "bf16"), (ADAM, "fp32"), (ADAM, "bf16"), (IN_BYTES, "fp32")],
    ids=["adagrad-fp32", "adagrad-bf16", "adam-fp32", "adam-bf16", "adam-in-bytes"],
)
def test_a_fused_run_learns_and_is_resumed_to_the_same_bits(keys, precision, tmp_path, tiny_config):
    # Rates follow the number of steps, so that a shorter run has others, unless they are constant.
    constant = ("optimizer.dense.schedule=constant", f"{TABLES}.schedule=constant")
    config = set_keys(tiny_config, *keys, *constant, f"training.precision={precision}")
    one, two = (
        RunDirectory.create(tmp_path / name, set_keys(config, f"training.steps={steps}"))
        for name, steps in (("one", 12), ("two", 4))
    )
    events = recorded(one)
    stepped = of(Stepped, events)
    assert stepped[-1].loss < stepped[0].loss - 0.3
    assert all(event.table_grad_norm is None and event.dense_grad_norm > 0 for event in stepped)
    assert losses(recorded(two)) + losses(recorded(two, "training.steps=12")) == losses(events)
    ends = [run.checkpoints.load(12) for run in (one, two)]
    for name, table in ends[0].tables.items():
        other = ends[1].tables[name]
        assert table.weight.dtype == torch.bfloat16 and torch.equal(table.weight, other.weight)
        assert table.optimizer.keys() == other.optimizer.keys() != set()
        assert keys is not IN_BYTES or {tensor.dtype for tensor in table.optimizer.values()} == {torch.uint8}
        assert all(torch.equal(tensor, other.optimizer[key]) for key, tensor in table.optimizer.items())


def model(kind="memory"):
    torch.manual_seed(0)
    return build_model(
        ModelConfig(kind=kind, num_layers=1, hidden_dim=16, num_heads=2, bits=4, vocab_size=11, max_seq_len=8)
    )


def step_once(made, optimizer, step):
    optimizer.set_rates(optimizer.learning_rates(step, 10))
    made(torch.arange(8)[None] % 11).square().sum().backward()
    optimizer.step(optimizer.gradient_norms())


@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad", "adam"])
def test_fused_or_not_rows_take_the_same_steps(rule):
    ends = []
    for fused in (True, False):
        tables = TableGroupConfig(rule=rule, fused=fused, lr=0.01, clip_norm=0.0)
        made = model()
        before = {name: value.detach().clone() for name, value in made.named_parameters()}
        optimizer = RunOptimizer(made, OptimizerConfig(dense=DenseGroupConfig(lr=0.01), tables=tables), seed=5)
        for step in range(3):
            step_once(made, optimizer, step)
        ends.append(dict(made.named_parameters()))
        untouched = (ends[-1]["blocks.0.qkv.table.weight"] == before["blocks.0.qkv.table.weight"]).all(dim=1)
        assert 0 < untouched.sum() < untouched.numel()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_unfused_rows_are_clipped_and_add_up_micro_batches(tmp_path, tiny_config):
    keys = (f"{TABLES}.rule=rowwise_adagrad", f"{TABLES}.fused=false", f"{TABLES}.clip_norm=0.5")
    config = set_keys(tiny_config, *keys, "training.micro_batches=2")
    events = recorded(RunDirectory.create(tmp_path / "run", config))
    assert of(Stepped, events)[-1].table_grad_norm > 0
    assert of(Evaluated, events)[-1].loss < of(Stepped, events)[0].loss


def test_tables_have_seeds_of_their_own_that_follow_from_the_runs():
    def seeds(seed):
        optimizer = RunOptimizer(model(), OptimizerConfig(tables=TableGroupConfig(rule="adam")), seed=seed)
        return [state.optimizer.seed for _, state in optimizer._rows.values()]

    assert len({*seeds(0), *seeds(1)}) == 6 and seeds(0) == seeds(0)


def test_settings_reach_the_rows():
    tables = TableGroupConfig(rule="rowwise_adagrad", accumulator_decay=0.75, weight_decay=0.25)
    optimizer = RunOptimizer(model(), OptimizerConfig(tables=tables))
    for _, state in optimizer._rows.values():
        assert (state.optimizer.decay, state.optimizer.weight_decay) == (0.75, 0.25)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.uint8)])
def test_adams_states_are_of_the_dtype_asked_for(name, dtype):
    optimizer = RunOptimizer(model(), OptimizerConfig(tables=TableGroupConfig(rule="adam", state_dtype=name)))
    for rows, state in optimizer._rows.values():
        assert {tensor.dtype for tensor in state.tensors.values()} == {dtype}
        assert sum(tensor.nbytes for tensor in state.tensors.values()) == 2 * dtype.itemsize * rows.numel()


def test_a_step_that_is_not_finite_leaves_fused_rows_finite_and_says_what_was_updated(tiny_config):
    tables = TableGroupConfig(rule="rowwise_adagrad")
    made = model()
    optimizer = RunOptimizer(made, OptimizerConfig(tables=tables))
    step = TrainStep(made, optimizer, tiny_config.training, torch.device("cpu"))
    with torch.no_grad():
        made.head.weight[3] = torch.nan
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    tokens = torch.arange(8)[None] % 11
    with pytest.raises(NonFiniteError, match="only rows with finite gradients were updated"):
        step(0, tokens, tokens)
    for name, value in made.named_parameters():
        assert torch.equal(value, before[name]) or name == "head.weight"


def test_a_runs_rule_cannot_change_but_its_rate_can(tmp_path, tiny_config):
    run = RunDirectory.create(tmp_path / "run", set_keys(tiny_config, *ADAGRAD))
    train(run)
    with pytest.raises(ConfigError, match=r"--set optimizer\.tables\.rule=adam"):
        train(run, overrides=[f"{TABLES}.rule=adam"])
    run.write_config(set_keys(run.config, f"{TABLES}.rule=sgd", f"{TABLES}.lr=0.1"))
    with pytest.raises(ConsistencyError, match="rule"):
        train(run)
    run.write_config(set_keys(run.config, f"{TABLES}.rule=rowwise_adagrad"))
    started = of(Started, recorded(run, "training.steps=14", f"{TABLES}.lr=0.01"))
    assert started[0].first_step == 12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((f"{TABLES}.fused=true",), r'needs a row optimiser; got rule="adamw"'),
        ((f"{TABLES}.rule=adam", f"{TABLES}.clip_norm=1.0"), r"clip_norm must be 0 where tables are fused"),
        ((f"{TABLES}.rule=sgd",), r"give optimizer\.tables\.lr"),
        ((f"{TABLES}.rule=rowwise_adagrad", f"{TABLES}.state_dtype=bf16"), r'state_dtype="bf16" is for rule="adam"'),
        ((f"{TABLES}.state_dtype=fp8",), r'state_dtype="fp8" is for rule="adam"; got rule="adamw"'),
        ((f"{TABLES}.rule=adam", f"{TABLES}.state_dtype=fp16"), r"optimizer\.tables\.state_dtype"),
        ((f"{TABLES}.rule=adam", f"{TABLES}.accumulator_decay=0.9"), 'accumulator_decay is for rule="rowwise_adagrad"'),
        (("model.table_dtype=bf16",), r'"bf16" needs a row optimiser'),
        ((f"{TABLES}.rule=adam", "training.micro_batches=2"), r"micro_batches must be 1 where tables are fused"),
    ],
)
def test_what_does_not_go_together(keys, message):
    minimal = """
[model]
num_layers = 1
hidden_dim = 32
num_heads = 2
[training]
steps = 4
batch_size = 4
seq_len = 16
"""
    with pytest.raises(ConfigError, match=message):
        parse_config(minimal, origin="test", overrides=keys)
    fine = parse_config(minimal, origin="test", overrides=[f"{TABLES}.rule=adam"])
    assert fine.optimizer.tables.is_fused and fine.optimizer.tables.clip_norm == 0.0
    assert parse_config(fine.to_toml(), origin="again") == fine
    assert parse_config(minimal, origin="test").optimizer.tables.clip_norm == 1.0

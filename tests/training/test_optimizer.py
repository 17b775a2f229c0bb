"""The two groups: rates, decay, clipping and state."""

import pytest
import torch

from mfdist.config import DenseGroupConfig, ModelConfig, OptimizerConfig, ParameterGroupConfig, TableGroupConfig
from mfdist.models import build_model
from mfdist.training.optimizer import RunOptimizer, lr_factor, table_parameter_names


def model():
    torch.manual_seed(0)
    return build_model(ModelConfig(num_layers=1, hidden_dim=16, num_heads=2, bits=4, vocab_size=11, max_seq_len=8))


def with_gradients(made):
    tokens = torch.arange(8)[None] % 11
    made(tokens.to(next(made.parameters()).device)).square().sum().backward()
    return made


def update(optimizer, step):
    norms = optimizer.gradient_norms()
    optimizer.set_rates(optimizer.learning_rates(step, 10))
    optimizer.step(norms)


def test_every_parameter_is_in_one_group_and_tables_are_their_own():
    made = model()
    optimizer = RunOptimizer(made, OptimizerConfig())
    grouped = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(grouped) == sorted(id(value) for value in made.parameters())
    tables = {id(value) for group in optimizer.param_groups if group["group"] == "tables" for value in group["params"]}
    assert tables == {
        id(block) for block in (getattr(made.blocks[0], part).table.weight for part in ("qkv", "ffn1", "ffn2"))
    }
    assert set(table_parameter_names(made).values()) == {"blocks.0.qkv", "blocks.0.ffn1", "blocks.0.ffn2"}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if all(value.ndim > 1 for value in group["params"]) else 0.0)


def test_tables_learn_at_three_times_the_dense_rate_unless_told():
    rates = RunOptimizer(model(), OptimizerConfig(dense=DenseGroupConfig(lr=0.002))).learning_rates(0, 1)
    assert rates["tables"] == pytest.approx(3 * rates["dense"])
    told = OptimizerConfig(dense=DenseGroupConfig(lr=0.002), tables=TableGroupConfig(lr=0.5, schedule="constant"))
    assert RunOptimizer(model(), told).learning_rates(50, 100)["tables"] == 0.5


def test_the_embedding_learns_at_its_own_rate_and_on_the_dense_schedule():
    made = model()
    optimizer = RunOptimizer(made, OptimizerConfig(dense=DenseGroupConfig(lr=0.002, embedding_lr_multiple=5.0)))
    for step in (0, 7):
        rates = optimizer.learning_rates(step, 10)
        optimizer.set_rates(rates)
        of_embedding = [group for group in optimizer.param_groups if group["share"] != 1]
        assert [id(value) for group in of_embedding for value in group["params"]] == [id(made.embedding.weight)]
        assert of_embedding[0]["lr"] == pytest.approx(5 * rates["dense"])
        assert of_embedding[0]["weight_decay"] == 0.1
        others = [group for group in optimizer.param_groups if group["share"] == 1]
        assert all(group["lr"] == rates[group["group"]] for group in others)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_rise_then_fall_to_the_floor(schedule):
    settings = ParameterGroupConfig(warmup_fraction=0.1, min_lr_fraction=0.05, schedule=schedule)
    factors = [lr_factor(settings, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.05)


def test_one_step_runs_need_no_warm_up():
    assert lr_factor(ParameterGroupConfig(), 0, 1) == 1.0


def test_groups_are_clipped_apart_and_norms_are_those_before():
    made = with_gradients(model())
    config = OptimizerConfig(
        dense=DenseGroupConfig(lr=0.1, clip_norm=0.5), tables=TableGroupConfig(lr=0.1, clip_norm=0.25)
    )
    tables = table_parameter_names(made)
    groups = {
        "tables": [value.grad for name, value in made.named_parameters() if name in tables],
        "dense": [value.grad for name, value in made.named_parameters() if name not in tables],
    }
    before = {name: torch.cat([g.flatten() for g in gradients]).norm().item() for name, gradients in groups.items()}
    optimizer = RunOptimizer(made, config)
    norms = {name: norm.item() for name, norm in optimizer.gradient_norms().items()}
    gradients = {name: [g.clone() for g in each] for name, each in groups.items()}
    optimizer.drop_gradients = lambda: None  # so that what AdamW was given can be seen
    update(optimizer, 0)
    after = {name: torch.cat([g.flatten() for g in gradients]).norm().item() for name, gradients in groups.items()}
    assert norms == pytest.approx(before)
    for name, limit in (("dense", 0.5), ("tables", 0.25)):
        for scaled, whole in zip(groups[name], gradients[name], strict=True):
            torch.testing.assert_close(scaled, whole * (limit / before[name]), rtol=1e-4, atol=1e-8)
    assert after == pytest.approx({"dense": 0.5, "tables": 0.25}, rel=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 1e9])
def test_gradients_within_the_limit_are_left_alone(clip_norm):
    made = with_gradients(model())
    kept = [value.grad.clone() for value in made.parameters()]
    settings = {"lr": 0.1, "clip_norm": clip_norm}
    config = OptimizerConfig(dense=DenseGroupConfig(**settings), tables=TableGroupConfig(**settings))
    optimizer = RunOptimizer(made, config)
    optimizer.drop_gradients = lambda: None
    update(optimizer, 0)
    assert all(torch.equal(old, value.grad) for old, value in zip(kept, made.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_state_moves_by_name_to_a_new_optimizer(device):
    made, again = with_gradients(model().to(device)), model().to(device)
    first = RunOptimizer(made, OptimizerConfig())
    update(first, 0)
    again.load_state_dict(made.state_dict())
    second = RunOptimizer(again, OptimizerConfig())
    second.load_state(first.state(), 1)
    for each, optimizer in ((made, first), (again, second)):
        with_gradients(each)
        update(optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_the_dense_twin_has_no_table_group():
    twin = build_model(
        ModelConfig(kind="dense", num_layers=1, hidden_dim=16, num_heads=2, vocab_size=11, max_seq_len=8)
    )
    optimizer = RunOptimizer(twin, OptimizerConfig())
    assert {group["group"] for group in optimizer.param_groups} == {"dense"}
    assert optimizer.gradient_norms()["tables"].item() == 0.0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tables", [{}, {"rule": "sgd", "lr": 0.1, "fused": False}, {"rule": "adam", "fused": False}])
def test_a_step_that_is_not_sound_changes_no_parameter_and_no_state(tables, device):
    made = model().to(device)
    optimizer = RunOptimizer(made, OptimizerConfig(tables=TableGroupConfig(clip_norm=1.0, **tables)))
    for is_sound in (True, False, True):
        with_gradients(made)
        before = [value.detach().clone() for value in made.parameters()]
        states = {(name, key): value.clone() for name, each in optimizer.state().items() for key, value in each.items()}
        optimizer.set_rates(optimizer.learning_rates(0, 10))
        optimizer.step(optimizer.gradient_norms(), torch.tensor(is_sound, device=device))
        after = {(name, key): value for name, each in optimizer.state().items() for key, value in each.items()}
        changed = [not torch.equal(old, new) for old, new in zip(before, made.parameters(), strict=True)]
        assert all(changed) if is_sound else not any(changed)
        assert is_sound or all(torch.equal(value, after[key]) for key, value in states.items())

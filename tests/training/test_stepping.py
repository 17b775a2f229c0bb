"""Steps that are queued before the figures of the last are read: the same figures, and nothing done after a failure."""

import gc
import statistics
import time
import weakref

import pytest
import torch

from mfdist.config import parse_config
from mfdist.errors import ConfigError, NonFiniteError
from mfdist.models import build_model
from mfdist.training.device import deterministic
from mfdist.training.loop import train
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.run import RunDirectory
from mfdist.training.step import TrainStep
from mfdist.training.step_graph import EAGER_STEPS, StepGraph, check_graph
from mfdist.training.stepping import Stepping

STEPS = 12
ADAGRAD = ("optimizer.tables.rule=rowwise_adagrad", "optimizer.tables.clip_norm=0")
#: Figures that are told of a step, but for its time.
FIGURES = ("step", "loss", "dense_lr", "table_lr", "dense_grad_norm", "table_grad_norm")


def begin(config, overrides, device, **options):
    config = parse_config(config.to_toml(), origin="test", overrides=["model.vocab_size=11", *overrides])
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(config.model)
    optimizer = RunOptimizer(model, config.optimizer)
    tokens = torch.randint(11, (STEPS, 4, 33), generator=torch.Generator().manual_seed(1))
    device = torch.device(device)
    step = TrainStep(model, optimizer, config.training, device)
    stepping = Stepping(step, lambda at: (tokens[at, :, :-1], tokens[at, :, 1:]), config, device, **options)
    return model, optimizer, stepping


def states(model, optimizer):
    found = {f"{name}.{key}": value for name, each in optimizer.state().items() for key, value in each.items()}
    return {key: value.detach().clone() for key, value in (found | dict(model.named_parameters())).items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overrides", [(), ADAGRAD], ids=["adamw", "fused"])
def test_running_ahead_changes_no_figure_and_tells_of_each_step_once(overrides, device, tiny_config):
    told, ends = [], []
    for is_ahead in (False, True):
        model, optimizer, stepping = begin(tiny_config, overrides, device, is_ahead=is_ahead, first_profiled=7)
        events = []
        for step in range(STEPS):
            found = list(stepping.step(step, is_read=step == 4))
            events += found
            late = is_ahead and step != 4
            assert [event.step for event in found][-1:] == ([step + 1] if not late else [step][: step not in (0, 5)])
        events += stepping.rest()
        assert [event.time_shares is not None for event in events].index(True) == 7
        assert len(stepping.seconds) == 11 and min(stepping.seconds) > 0
        told.append([[getattr(event, name) for name in FIGURES] for event in events])
        ends.append(states(model, optimizer))
    assert told[0] == told[1] and [figures[0] for figures in told[0]] == list(range(1, STEPS + 1))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overrides", [(), ADAGRAD], ids=["adamw", "fused"])
def test_after_a_step_that_is_not_finite_those_behind_it_change_nothing(overrides, device, tiny_config):
    model, optimizer, stepping = begin(tiny_config, overrides, device, is_ahead=True)
    calls = []

    def spoil(module, inputs, output):
        calls.append(None)
        # The fourth step's logits, and those of the step repeated to find the layer: after the one behind it.
        return output * torch.inf if len(calls) in (4, 6) else output

    model.head.register_forward_hook(spoil)
    for step in range(3):
        list(stepping.step(step))
    list(stepping.rest())
    before = states(model, optimizer)
    assert list(stepping.step(3)) == []
    with pytest.raises(NonFiniteError, match=r"at step 4, first in head \(output\)"):
        list(stepping.step(4))
    # Tables trained in backward have their own gradients' say, row by row; here none were finite.
    assert all(torch.equal(value, before[name]) for name, value in states(model, optimizer).items())
    assert list(stepping.rest()) == []
    told = [*stepping.step(3), *stepping.rest()]
    assert [event.step for event in told] == [4] and len(calls) == 7
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("first_profiled", [None, 4, 3], ids=["none", "the one behind", "itself"])
def test_a_step_that_is_not_finite_is_found_at_the_same_place_whichever_is_profiled(
    first_profiled, device, tiny_config
):
    # Ranks profile by their own clocks: one that finds out sooner would wait in an exchange that the others are not in.
    model, _, stepping = begin(tiny_config, (), device, is_ahead=True, first_profiled=first_profiled)
    calls = []

    def spoil(module, inputs, output):
        calls.append(None)
        return output * torch.inf if len(calls) in (4, 6) else output

    model.head.register_forward_hook(spoil)
    told = [event.step for step in range(4) for event in stepping.step(step)]
    assert told == [1, 2, 3] and len(calls) == 4
    with pytest.raises(NonFiniteError, match=r"at step 4, first in head \(output\)"):
        list(stepping.step(4))
    assert len(calls) == 6


@pytest.mark.parametrize("is_ahead", [False, True])
def test_the_last_step_is_told_of_where_the_next_has_nothing_to_read(is_ahead, tiny_config):
    _, _, stepping = begin(tiny_config, (), "cpu", is_ahead=is_ahead)
    told = [event.step for step in range(STEPS) for event in stepping.step(step)]
    with pytest.raises(IndexError):
        for event in stepping.step(STEPS):
            told.append(event.step)
    assert told == list(range(1, STEPS + 1)) and list(stepping.rest()) == []


GRAPH = "training.cuda_graph=true"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own
@pytest.mark.parametrize("compiled", ["false", "true"], ids=["one by one", "compiled"])
@pytest.mark.parametrize(
    "overrides",
    [(), ("training.micro_batches=2",), (*ADAGRAD, "model.table_dtype=bf16")],
    ids=["adamw", "two parts", "fused"],
)
def test_a_step_as_one_graph_has_the_figures_of_its_kernels_one_by_one(overrides, compiled, tiny_config):
    told, ends = [], []
    for graph in ("false", "true"):
        how = ("training.precision=bf16", f"training.compile={compiled}", f"training.cuda_graph={graph}")
        model, optimizer, stepping = begin(tiny_config, (*overrides, *how), "cuda", is_ahead=True, first_profiled=2)
        with deterministic(True):  # or compiled code adds an embedding's gradients in any order
            events = [event for step in range(STEPS) for event in stepping.step(step, is_read=step == 6)]
            events += stepping.rest()
        assert sum(event.time_shares is not None for event in events) == 1
        assert stepping._train_step.is_one_call == (graph == "true")
        told.append([[getattr(event, name) for name in FIGURES] for event in events])
        ends.append(states(model, optimizer))
    assert told[0] == told[1] and [figures[0] for figures in told[0]] == list(range(1, STEPS + 1))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.gpu
def test_a_step_as_one_graph_that_is_not_finite_changes_nothing_and_the_next_one_trains(tiny_config):
    model, optimizer, stepping = begin(tiny_config, (GRAPH,), "cuda", is_ahead=True)
    for step in range(EAGER_STEPS + 2):
        list(stepping.step(step))
    list(stepping.rest())
    weight = model.head.weight
    sound = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.inf
    before = states(model, optimizer)
    list(stepping.step(EAGER_STEPS + 2))
    with pytest.raises(NonFiniteError, match=rf"at step {EAGER_STEPS + 3}, first in head"):
        list(stepping.step(EAGER_STEPS + 3))
    assert all(torch.equal(value, before[name]) for name, value in states(model, optimizer).items())
    with torch.no_grad():
        weight.copy_(sound)
    told = [*stepping.step(EAGER_STEPS + 2), *stepping.rest()]
    assert [event.step for event in told] == [EAGER_STEPS + 3] and not torch.equal(weight, sound)


@pytest.mark.gpu
def test_steps_that_are_read_late_are_told_with_the_devices_time(tiny_config):
    _, _, stepping = begin(tiny_config, (), "cuda", is_ahead=True)
    list(stepping.step(0, is_read=True))  # which compiles
    start = time.perf_counter()
    for step in range(1, STEPS):
        list(stepping.step(step, is_read=step % 3 == 0))
    torch.cuda.synchronize()
    list(stepping.rest())
    wall = time.perf_counter() - start
    assert sum(stepping.seconds[1:]) <= wall  # nothing counts twice
    assert min(stepping.seconds[1:]) > 0.1 * statistics.median(stepping.seconds[1:])


@pytest.mark.parametrize(
    ("device", "world_size", "elsewhere", "got"),
    [
        ("cpu", 1, None, "device=cpu, world_size=1; set"),
        ("cuda", 2, None, "device=cuda, world_size=2; set"),
        ("cuda", 1, 'table "t"', 'device=cuda, world_size=1, and table "t" elsewhere; set'),
    ],
)
def test_a_graph_needs_one_gpu_that_holds_the_model(device, world_size, elsewhere, got):
    check_graph(torch.device("cuda"), 1, None)
    with pytest.raises(ConfigError, match=f"needs one GPU that holds the whole model; got {got} it to false"):
        check_graph(torch.device(device), world_size, elsewhere)


def test_a_graph_that_is_refused_leaves_the_run_as_it_was(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match="needs one GPU"):
        begin(tiny_config, (GRAPH,), "cpu")
    config = parse_config(tiny_config.to_toml(), origin="test", overrides=["training.steps=2"])
    run = RunDirectory.create(tmp_path / "run", config)
    assert train(run).step == 2
    kept = (run.path / "config.toml").read_text("utf-8")
    with pytest.raises(ConfigError, match="needs one GPU"):
        train(run, overrides=["training.steps=3", GRAPH])
    assert (run.path / "config.toml").read_text("utf-8") == kept
    assert train(run, overrides=["training.steps=3"]).step == 3


def test_what_trained_with_a_graph_is_gone_with_its_last_name(tiny_config):
    model, optimizer, stepping = begin(tiny_config, (), "cpu")
    stepping._train_step._graph = StepGraph(model.parameters())
    gone = weakref.ref(model)
    is_on = gc.isenabled()
    gc.disable()  # the memory of a GPU does not wait for a collection
    try:
        del model, optimizer, stepping
        assert gone() is None
    finally:
        if is_on:
            gc.enable()

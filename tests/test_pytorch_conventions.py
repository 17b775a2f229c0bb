"""What users of torch do with any module, done with ours; docs/explanation/pytorch-conventions.md lists it.

Those that other files test already are linked there: the layer compiled (tests/kernels/test_operators.py), DDP and
FSDP2 beside sharded tables (tests/test_parallelize.py), DTensors in checkpoints (tests/checkpoint/test_dense_shard.py).
"""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from mfdist import MemoryFormer, MemoryLayer
from mfdist.config import ModelConfig
from mfdist.optim import RowSGD
from mfdist.table import Table
from mfdist.testing.run_ranks import RankPool
from tests import pytorch_conventions_ranks as ranks

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ModelConfig(num_layers=2, hidden_dim=16, num_heads=2, bits=4, extra_bits=1, vocab_size=40, max_seq_len=16)


def made(**changes):
    torch.manual_seed(0)
    return MemoryFormer(SHAPE.model_copy(update=changes))


def tokens(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def gradients(model, forward, batch):
    loss = cross_entropy(forward(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_model_compiles_as_one_graph_forward_and_backward():
    model, batch = made(), tokens(3, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, found = gradients(model, compiled, batch)
    expected_loss, expected = gradients(model, model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)


def test_a_model_for_inference_compiles_as_one_graph():
    model, batch = made().eval(), tokens(3, 9)
    with torch.inference_mode():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(batch), model(batch))


@pytest.fixture(scope="module")
def pool():
    with RankPool() as started:
        yield started


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_tables_are_ordinary_parameters_to(pool, wrapper):
    for losses, expected, distance in pool.run(ranks.plain_tables, 2, wrapper, timeout_s=120):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert losses[-1] < losses[0]
        assert distance < 1e-5


def recomputing(model):
    """Wrap every block so that its activations are computed again in backward."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    return model


def test_activation_checkpointing_changes_no_gradient():
    batch = tokens(3, 9)
    plain, again = made(), recomputing(made())
    loss, found = gradients(again, again, batch)
    expected_loss, expected = gradients(plain, plain, batch)
    assert loss == expected_loss
    assert_close(found, expected)


def test_activation_checkpointing_updates_fused_tables_once():
    batch = tokens(3, 9)
    models = made(), recomputing(made())
    for model in models:
        for table in [module for module in model.modules() if isinstance(module, Table)]:
            table.fuse(RowSGD(lr=0.5))
            table.row_state.lr = 0.5
        gradients(model, model, batch)
    before = made()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-6, atol=1e-7)
    name = "blocks.0.qkv.table.weight"
    assert not torch.equal(models[1].state_dict()[name], before.state_dict()[name])


def through_a_file(content, **how):
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    return torch.load(stream, **how)


def test_state_dicts_go_through_a_file_strictly_and_by_assignment():
    model, batch = made(), tokens(2, 9)
    state = through_a_file(model.state_dict(), weights_only=True)
    assert [name for name, _ in model.named_parameters()] == list(state)
    torch.manual_seed(7)
    copied, assigned = MemoryFormer(SHAPE), MemoryFormer(SHAPE, device="meta")
    copied.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(copied(batch), model(batch)) and torch.equal(assigned(batch), model(batch))


def test_a_whole_model_goes_through_a_file():
    model, batch = made(), tokens(2, 9)
    assert torch.equal(through_a_file(model, weights_only=False)(batch), model(batch))


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_deep_copy_shares_nothing(is_fused):
    model, batch = made(), tokens(3, 9)
    if is_fused:
        for table in [module for module in model.modules() if isinstance(module, Table)]:
            table.fuse(RowSGD(lr=0.5))
    twin, before = copy.deepcopy(model), model(batch).detach()
    assert torch.equal(twin(batch), before)
    gradients(twin, twin, batch)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(batch), before) and not torch.equal(twin(batch), before)


def test_a_model_on_the_meta_device_gives_shapes_and_can_be_emptied_and_drawn():
    meta = MemoryFormer(SHAPE, device="meta")
    assert meta(tokens(2, 9).to("meta")).shape == (2, 9, 40)
    with torch.device("meta"):
        layer = MemoryLayer(16, 24, bits=4)
    assert layer.table.weight.is_meta and layer(torch.empty(3, 16, device="meta")).shape == (3, 24)
    real = layer.to_empty(device="cpu")
    for module in real.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert real(torch.randn(3, 16)).isfinite().all()
    assert real.table.weight.std().item() == pytest.approx(real.table.std, rel=0.1)


@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_a_model_for_inference_is_exported_for_any_batch_and_length(kind):
    from mfdist.models import build_model

    torch.manual_seed(0)
    model = build_model(SHAPE.model_copy(update={"kind": kind})).eval().requires_grad_(False)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=SHAPE.max_seq_len)}
    with torch.no_grad():
        program = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=(sizes,))
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        again = torch.export.load(stream).module()
        for shape in ((2, 9), (1, 1), (5, 16)):
            torch.testing.assert_close(again(tokens(*shape)), model(tokens(*shape)), rtol=1e-5, atol=1e-6)
    if kind == "memory":
        called = [str(node.target) for node in program.graph.nodes]
        assert called.count("mfdist.hashed_gather_sum.default") == 6


def test_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "explanation" / "pytorch-conventions.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for file, test in named:
        assert not test or re.search(rf"def {test}\b", (ROOT / file).read_text("utf-8")), f"{file}::{test}"

"""The models against numpy in float64, and what both kinds must share."""

import copy

import pytest
import torch

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError
from mfdist.layers import MemoryLayer
from mfdist.models import DenseTransformer, MemoryFormer, build_model
from mfdist.models.attention import attend, place

from . import numpy_memoryformer


def config(kind="memory", **changes):
    base = {
        "kind": kind,
        "num_layers": 2,
        "hidden_dim": 32,
        "num_heads": 2,
        "bits": 4,
        "vocab_size": 50,
        "max_seq_len": 32,
    }
    return ModelConfig(**(base | changes))


def made(kind="memory", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = build_model(config(kind, **changes))
    for parameter in model.parameters():  # unlike the initialisation, nothing is 0 or 1
        torch.nn.init.normal_(parameter, mean=0.1, std=0.5)
    return model.to(dtype)


def tokens(shape=(2, 9), seed=1):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score", ["paper", "released"])
@pytest.mark.parametrize(
    ("rotary_fraction", "activation"), [(0.0, "none"), (0.25, "none"), (0.25, "gelu"), (1.0, "none")]
)
def test_memoryformer_equals_the_numpy_one(score, rotary_fraction, activation):
    model = made(dtype=torch.float64, score=score, rotary_fraction=rotary_fraction, activation=activation)
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    batch = tokens()
    with torch.no_grad():
        got = model(batch)
    for row, logits in zip(batch.numpy(), got.numpy(), strict=True):
        expected = numpy_memoryformer.forward(
            parameters,
            row,
            num_layers=2,
            num_heads=2,
            bits=4,
            extra_bits=2,
            rotary_dim=int(16 * rotary_fraction),
            kind=score,
            activation=activation,
        )
        assert abs(logits - expected).max() <= 1e-9 * abs(expected).max()


@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_cached_decoding_gives_the_logits_of_the_whole_sequence(kind):
    model, batch = made(kind, torch.float64), tokens((2, 12))
    with torch.inference_mode():
        whole = model(batch)
        caches = model.new_caches(2, 12)
        parts = [model(batch[:, piece], caches) for piece in (slice(0, 4), slice(4, 5), slice(5, 9), slice(9, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_no_position_sees_a_later_token(kind):
    model, batch = made(kind), tokens((1, 10))
    changed = batch.clone()
    changed[0, 6] = (batch[0, 6] + 1) % 50
    with torch.inference_mode():
        before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=0)
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()


def test_the_twins_differ_in_their_projections_alone():
    memory, dense = made(), made("dense")
    shared = {"embedding.weight", "head.weight", "norm.weight", "blocks.0.attention_norm.weight"}
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (memory, dense)]
    assert all(shapes[0][name] == shapes[1][name] for name in shared)
    assert not any(isinstance(module, torch.nn.Linear) for module in memory.blocks.modules())
    assert not any(isinstance(module, MemoryLayer) for module in dense.modules())
    assert isinstance(memory, MemoryFormer) and isinstance(dense, DenseTransformer)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(build_model(config()).blocks[0].qkv.table.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_initial_spread_is_the_released_codes():
    torch.manual_seed(0)
    block = build_model(config(hidden_dim=128, bits=8)).blocks[0]
    for layer, std in ((block.qkv, (2 / 5 / 128) ** 0.5), (block.ffn1, 0.02), (block.ffn2, 0.02)):
        assert layer.table.weight.std().item() == pytest.approx(std, rel=0.02)
        assert layer.bias.std().item() == pytest.approx(0.001, rel=0.3)


def test_meta_models_copies_and_state_dicts():
    meta = build_model(config(), device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    model, batch = made(), tokens()
    again = build_model(config())
    again.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(model(batch), again(batch)) and torch.equal(model(batch), twin(batch))


def test_an_untrained_model_is_near_chance():
    torch.manual_seed(0)
    for kind in ("memory", "dense"):
        model, batch = build_model(config(kind)), tokens((4, 32))
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.3)


def test_wrong_use_is_told_in_one_line():
    with pytest.raises(ConfigError, match=r"max_seq_len=32 tokens; got 33"):
        made()(tokens((1, 33)))
    with pytest.raises(ConfigError, match=r"vocab_size must be set"):
        build_model(config(vocab_size=0))
    with pytest.raises(ConfigError, match=r'kind "memory"; got model.kind="dense"'):
        MemoryFormer(config("dense"))
    model = made()
    with pytest.raises(ConfigError, match=r"must fit the cache; got 5 tokens, capacity 4"), torch.inference_mode():
        model(tokens((1, 5)), model.new_caches(1, 4))


def test_attention_of_one_token_is_its_value():
    qkv = torch.randn(2, 1, 3 * 8)
    placement = place(torch.tensor([3]), 2, qkv.dtype)
    torch.testing.assert_close(attend(qkv, 2, placement), qkv[..., 16:])


def test_attention_adds_a_residual():
    qkv, residual = torch.randn(2, 5, 3 * 8), torch.randn(2, 5, 8)
    placement = place(torch.arange(5), 2, qkv.dtype)
    expected = attend(qkv, 2, placement) + residual
    assert torch.equal(attend(qkv, 2, placement, residual=residual), expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # too
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_decoding_on_a_gpu_gives_the_logits_of_the_whole_sequence(kind, activation):
    """With kernels of its own: one for attention, one each for a lookup with its norm and sums."""
    model, batch = made(kind, activation=activation).cuda().requires_grad_(False), tokens((3, 12)).cuda()
    called = []
    with torch.inference_mode():
        whole = model(batch)
        handles = [module.register_forward_hook(lambda *_: called.append(1)) for module in model.blocks[0].modules()]
        hooked = model(batch)  # what looks at modules sees them called
        for handle in handles:
            handle.remove()
        assert len(called) >= 6
        torch.testing.assert_close(hooked, whole, rtol=1e-3, atol=1e-3)
        caches = model.new_caches(3, 12)
        parts = [model(batch[:, :4], caches), *(model(batch[:, index : index + 1], caches) for index in range(4, 12))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
        stepwise = [cache.keys.clone() for cache in caches]
        for cache in caches:
            cache.length = 11
        compiled = torch.compile(model.next_logits, dynamic=False, fullgraph=True)
        torch.testing.assert_close(compiled(batch[:, 11:], caches), whole[:, -1], rtol=1e-3, atol=1e-3)
        assert all(cache.length == 12 for cache in caches)
        for cache, keys in zip(caches, stepwise, strict=True):
            torch.testing.assert_close(cache.keys, keys, rtol=1e-3, atol=1e-3)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        caches = model.new_caches(3, 12)
        narrow = [model(batch[:, index : index + 1], caches) for index in range(12)]
    assert torch.cat(narrow, dim=1).isfinite().all()

"""replace_linear on a trained model of transformers: the model goes on from near where it was, and trains on."""

import copy
import re

import pytest
import torch
from torch import nn

import mfdist.hugging_face.library  # noqa: F401 - before transformers, which would take our kernels/ for another's
from mfdist import MemoryLayer, replace_linear
from mfdist.conversion import ConvertedLinear
from mfdist.errors import ConfigError

from transformers import GPT2Config, GPT2LMHeadModel  # isort: skip

VOCAB, LENGTH = 64, 32
BLOCKS = ["*.attn.*", "*.mlp.*"]


def text(num_sequences, seed):
    """Return made-up text [num_sequences, LENGTH] in which each token makes a few others likely."""
    following = torch.softmax(3 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)), -1)
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (num_sequences, 1), generator=chance)
    for _ in range(LENGTH - 1):
        new = torch.multinomial(following[tokens[:, -1]], 1, generator=chance)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens


def losses_of_training(model, num_steps, first_seed, lr=3e-3):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    losses = []
    for step in range(num_steps):
        batch = text(16, first_seed + step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def loss_of(model):
    batch = text(64, 10**6)
    return model.eval()(batch, labels=batch).loss.item()


@pytest.fixture(scope="module")
def trained():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, **ends, **off)
    )
    losses_of_training(model, 120, 0)
    yield model
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sample():
    return [{"input_ids": text(32, 7000 + index)} for index in range(6)]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_converted_model_starts_near_the_original_and_trains_on(trained, sample, bits):
    model, drawn = copy.deepcopy(trained), copy.deepcopy(trained)
    before, bias = loss_of(trained), trained.transformer.h[0].attn.c_attn.bias
    done = replace_linear(model, include=BLOCKS, bits=bits, sample=sample)
    replace_linear(drawn, include=BLOCKS, bits=bits, sample=None)
    after, at_random = loss_of(model), loss_of(drawn)
    assert after - before < 0.1 * (at_random - before)
    assert len(done.layers) == 8 and all(0 < layer.error < 0.6 for layer in done.layers)
    assert not any(type(module).__name__ == "Conv1D" for module in model.modules())

    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, ConvertedLinear) and layer.memory.table.spec.name == "transformer.h.0.attn.c_attn"
    weight = trained.transformer.h[0].attn.c_attn.weight.T
    torch.testing.assert_close(layer.memory.bias, bias + weight @ layer.shift, rtol=1e-4, atol=1e-4)

    losses_of_training(model, 25, 5000, lr=1e-3)
    assert loss_of(model) < after - 0.02


def test_what_was_fitted_is_in_the_state_dict(trained, sample):
    model, again = copy.deepcopy(trained), copy.deepcopy(trained)
    replace_linear(model, include="*.mlp.*", bits=4, sample=sample)
    replace_linear(again, include="*.mlp.*", bits=4, sample=None)
    again.load_state_dict(model.state_dict())
    assert loss_of(again) == loss_of(model)


def test_printed_it_is_a_table(trained, sample):
    lines = str(replace_linear(copy.deepcopy(trained), include="*.mlp.*", bits=8, sample=sample)).splitlines()
    assert lines[0].split() == ["layer", "in", "out", "rows", "MiB", "rows", "hit", "error"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["transformer.h.0.mlp.c_fc", "64", "256", "2,048"],
        ["transformer.h.0.mlp.c_proj", "256", "64", "8,192"],
    ]
    assert all(re.fullmatch(r"\d+\.\d%", line.split()[-2]) for line in lines[1:])


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("a", (), ["a"]),
        (["a", "inner.*"], "inner.1", ["a", "inner.0"]),
        (re.compile(r"\d$"), (), ["inner.0", "inner.1"]),
        (lambda name, module: module.out_features == 6, (), ["inner.1"]),
    ],
)
def test_layers_are_chosen_by_name_expression_or_rule(include, exclude, expected):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "inner": nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 6)])})
    done = replace_linear(model, include=include, exclude=exclude, bits=2, sample=None)
    assert [layer.name for layer in done.layers] == expected
    assert all(layer.error is None for layer in done.layers) and "error" in str(done)
    assert sorted(name for name, module in model.named_modules() if isinstance(module, ConvertedLinear)) == expected


class Twice(nn.Module):
    """Uses one layer under two names, called with a keyword, without a bias, in 16 bits."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        self.second = self.first
        self.unused = nn.Linear(8, 8)

    def forward(self, x, y):
        return self.second(input=torch.relu(self.first(x) + y))


def test_a_shared_layer_is_replaced_by_every_name():
    model = Twice()
    sample = [tuple(torch.randn(2, 40, 50, 8).bfloat16())]
    [layer] = replace_linear(model, include="first", bits=2, sample=sample).layers
    assert model.first is model.second and isinstance(model.first, ConvertedLinear)
    assert model.first.memory.table.weight.dtype == torch.bfloat16 and layer.error < 0.7
    assert model(*sample[0]).dtype == torch.bfloat16


def test_misuse_is_told_in_one_line_and_changes_nothing():
    def told(**changes):
        model = Twice()
        with pytest.raises(ConfigError) as caught:
            replace_linear(model, **({"include": "*", "bits": 2, "sample": [torch.randn(2, 40, 8).unbind()]} | changes))
        assert type(model.first) is nn.Linear and "\n" not in str(caught.value)
        return str(caught.value)

    assert "include must fit linear layers of the model; got mlp*; it has first, unused" in told(include="mlp*")
    assert "exclude first, a rule" in told(include="first", exclude=["first", lambda name, module: False])
    text = told(bits=3)
    assert 'got bits=3 and in_features=8 of "first" and 1 more such layers; take bits of 1, 2, 4, 8, or' in text
    ours = [tuple(torch.randn(2, 40, 5, 8).bfloat16())]
    assert '"unused" got 0; exclude it, or give inputs that use it' in told(sample=ours)
    few = [tuple(torch.randn(2, 9, 8).bfloat16())]
    assert '"first" got 18; give more text' in told(sample=few)


def test_activations_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(100, 8)
    x[3, 4] = torch.inf
    with pytest.raises(ConfigError, match=r'activations must be finite to be fitted; those of "0" are not'):
        replace_linear(model, include="*", bits=4, sample=[x])


def test_modes_stay_and_memory_layers_take_the_trained_path():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    model[1].eval()
    replace_linear(model, include="*", bits=4, sample=[torch.randn(200, 8)])
    assert [module.training for module in model] == [True, False, True]
    assert sum(isinstance(module, MemoryLayer) for module in model.modules()) == 2


def test_an_encoder_of_torch_leaves_its_fast_path_which_reads_the_linear_layers_weights():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(8, 16, 16)
    replace_linear(model, include="*.linear[12]", bits=4, sample=[x])
    padding = torch.zeros(8, 16, dtype=torch.bool).index_fill(1, torch.tensor([14, 15]), True)
    for inputs in ({}, {"src_key_padding_mask": padding}):
        expected = model.train()(x, **inputs).detach()
        with torch.inference_mode():
            found = model.eval()(x, **inputs)
        torch.testing.assert_close(found[:, :14], expected[:, :14])

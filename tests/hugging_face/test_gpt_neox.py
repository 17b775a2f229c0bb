"""The dense twin and GPT-NeoX, Pythia's format: each computes the other's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mfdist.errors import CheckpointError, ConfigError
from mfdist.hugging_face import load_folder
from mfdist.models import DenseTransformer


def neox(**changes):
    """Pythia's settings, smaller; every parameter random, so that none is 0 or 1."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "max_position_embeddings": 32,
        "rotary_pct": 0.25,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**(sizes | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    return model.eval()


def tokens(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_pythia_comes_in_with_equal_logits(tmp_path, rotary_pct):
    theirs, batch = neox(rotary_pct=rotary_pct), tokens(2, 20)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_folder(tmp_path).model
    assert isinstance(ours, DenseTransformer) and not ours.training
    expected = theirs(batch).logits
    torch.testing.assert_close(ours(batch), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_the_names_and_buffers_of_old_checkpoints_are_understood(tmp_path):
    theirs, batch = neox(), tokens(2, 9)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    [head] = [name for name in tensors if name in ("lm_head.weight", "embed_out.weight")]
    tensors["lm_head.weight" if head == "embed_out.weight" else "embed_out.weight"] = tensors.pop(head)
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_folder(tmp_path).model
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    expected = theirs(batch).logits
    torch.testing.assert_close(ours(batch), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-6),
        ("use_parallel_residual", False),
        ("attention_bias", False),
        ("tie_word_embeddings", True),
        ("intermediate_size", 100),
        ("rotary_emb_base", 500),
        ("rope_parameters", {"rope_type": "yarn"}),
    ],
)
def test_what_the_twin_does_not_compute_is_refused(tmp_path, field, value):
    neox().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if field == "rotary_emb_base":
        config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ConfigError, match=rf"the dense twin computes GPT-NeoX with .*{field}") as caught:
        load_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_whole_is_told(tmp_path):
    neox().save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    missing = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        load_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"must hold every parameter of its model; gpt_neox\..* are not in"):
        load_folder(tmp_path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must have a config\.json"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"must have model_type memoryformer or gpt_neox; got 'llama'"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "hidden_size": 8}')
    with pytest.raises(ConfigError, match=r"config\.json must describe a model .* is missing"):
        load_folder(tmp_path)

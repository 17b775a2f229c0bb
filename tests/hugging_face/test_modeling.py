"""MemoryFormerForCausalLM: it is the model it wraps, and does what `transformers` expects of any model."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError
from mfdist.hugging_face import MemoryFormerConfig, MemoryFormerForCausalLM, memoryformer_format

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bits": 4,
    "max_position_embeddings": 32,
}
END = 3


def made(**changes):
    torch.manual_seed(0)
    model = MemoryFormerForCausalLM(MemoryFormerConfig(**SIZES, eos_token_id=END, pad_token_id=END, **changes))
    for parameter in model.parameters():  # unlike the initialisation, nothing is 0 or 1
        torch.nn.init.normal_(parameter, mean=0.1, std=0.5)
    return model.eval()


def tokens(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_is_the_model_it_wraps():
    model, batch = made(), tokens(2, 9)
    out = model(batch, labels=batch)
    assert torch.equal(out.logits, model.model(batch))
    assert out.loss.item() == pytest.approx(
        cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
    )
    assert torch.equal(model(batch, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(batch, return_dict=False)[0], out.logits)


@torch.no_grad()
def test_it_comes_back_from_a_folder_of_several_files(tmp_path):
    model, batch = made(), tokens(2, 9)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is MemoryFormerForCausalLM
    assert torch.equal(again(batch).logits, model(batch).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.shape == model.model.config and config.bits == 4


@torch.no_grad()
def test_rows_of_16_bits_stay_so(tmp_path):
    model, batch = made(table_dtype="bf16"), tokens(2, 9)
    assert model.model.blocks[0].qkv.table.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = MemoryFormerForCausalLM.from_pretrained(tmp_path)
    assert again.model.blocks[0].qkv.table.weight.dtype == torch.bfloat16
    assert again.model.head.weight.dtype == torch.float32
    assert torch.equal(again(batch).logits, model(batch).logits)


@torch.no_grad()
def test_padding_changes_nothing():
    model, batch = made(), tokens(2, 9)
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    padded, alone = model(batch, attention_mask=mask).logits, model(batch[:1, 4:]).logits
    torch.testing.assert_close(padded[:1, 4:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[1], model(batch).logits[1], rtol=1e-5, atol=1e-5)
    assert padded.isfinite().all()


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_sequence():
    model, batch = made(), tokens(2, 12)
    whole, cache, parts = model(batch).logits, None, []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 9), slice(9, 12)):
        out = model(batch[:, piece], cache=cache)
        cache = out.cache
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 12
    assert model(batch, use_cache=False).cache is None


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "static cache"],
)
def test_generation_with_the_cache_and_padding_is_that_without(how):
    model, batch = made(), tokens(2, 9)
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    length = {"max_new_tokens": 8, "min_new_tokens": 8}
    got = model.generate(batch, attention_mask=mask, **length, **how)
    searched = {key: value for key, value in how.items() if key != "cache_implementation"}
    plain = model.generate(batch, attention_mask=mask, use_cache=False, **length, **searched)
    alone = model.generate(batch[:1, 4:], **length, **searched)
    assert got.shape == (2, 17)
    assert torch.equal(got, plain)
    assert torch.equal(got[:1, 4:], alone)


def test_a_model_of_ours_is_saved_as_one(tmp_path):
    ours, batch = made().model, tokens(2, 9)
    wrapped = MemoryFormerForCausalLM.of(ours, eos_token_id=END)
    assert wrapped.model is ours and wrapped.config.eos_token_id == END and not wrapped.training
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(MemoryFormerForCausalLM.from_pretrained(tmp_path)(batch).logits, ours(batch))


def test_it_trains():
    model, batch = made().train(), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_a_folder_lacks_is_drawn_as_a_new_model_draws_it(tmp_path):
    model = made()
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if ".0." not in k})
    again = MemoryFormerForCausalLM.from_pretrained(tmp_path)
    block = again.model.blocks[0]
    assert block.qkv.table.weight.std().item() == pytest.approx((2 / 5 / 32) ** 0.5, rel=0.1)
    assert torch.equal(block.attention_norm.weight, torch.ones(32))
    assert torch.equal(again.model.blocks[1].qkv.table.weight, model.model.blocks[1].qkv.table.weight)


def test_sizes_that_do_not_fit_are_told_in_one_line():
    with pytest.raises(ConfigError, match=r"config\.json must describe .* bits must divide hidden_dim; got") as caught:
        MemoryFormerForCausalLM(MemoryFormerConfig(**(SIZES | {"bits": 5})))
    assert "\n" not in str(caught.value)


def test_every_field_of_a_shape_is_written_down():
    assert set(memoryformer_format.fields_of(made().model.config)) == set(memoryformer_format._FIELDS)
    assert set(memoryformer_format._FIELDS.values()) == ModelConfig.model_fields.keys() - {"kind"}
    own = set(MemoryFormerConfig(**SIZES).to_dict())
    assert set(memoryformer_format._FIELDS) <= own

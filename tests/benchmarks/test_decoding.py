"""How fast models write: a twin that is fair to compare with, and figures for all that were asked."""

import pytest
import torch

from mfdist.benchmarks.decoding import dense_twin, measure_decoding, random_model
from mfdist.config import ModelConfig

SHAPE = ModelConfig(num_layers=2, hidden_dim=32, num_heads=2, bits=4, vocab_size=50, max_seq_len=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_is_in_the_models_dtype_and_takes_no_random_numbers(dtype):
    model = random_model(SHAPE, dtype=dtype)
    before = torch.get_rng_state()
    twin = dense_twin(model)
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    assert (twin.config.kind, twin.config.hidden_dim) == ("dense", 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_model_is_measured_beside_the_first():
    model = random_model(SHAPE, dtype=torch.float32)
    found = measure_decoding({"twin": dense_twin(model), "model": model}, num_tokens=4, rounds=2)
    assert list(found) == ["twin", "model"] and found["twin"].ratio == 1.0
    assert all(each.tokens_per_s > 0 for each in found.values())

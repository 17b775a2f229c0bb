"""The census of codes against sign bits taken by numpy, with padding, thinning and large tables."""

import numpy as np
import pytest
import torch
from torch import nn

from mfdist.layers import MemoryLayer
from mfdist.training import code_census
from mfdist.training.code_census import BUCKETS_AN_OCTAVE, LOWEST_OCTAVE, CodeCensus
from mfdist.training.world import World

ALONE = World(device=torch.device("cpu"))


def net(bits=4, tables=3):
    """Return two layers in a row, whose inputs are known: the second sees what the first gives."""
    return nn.Sequential(
        MemoryLayer(bits * tables, bits * tables, bits, name="first"),
        nn.LayerNorm(bits * tables),
        MemoryLayer(bits * tables, 8, bits, name="second"),
    )


def hits_of(x, bits):
    """Return hits [K, 2^bits] of activations [N, d], by the definition."""
    signs = (x.detach().numpy() >= 0).reshape(len(x), -1, bits)
    codes = (signs * 2 ** np.arange(bits - 1, -1, -1)).sum(-1)
    return np.stack([np.bincount(column, minlength=1 << bits) for column in codes.T])


@pytest.mark.parametrize("bits", [1, 4, 9])
def test_every_layer_is_counted_in_the_forward_and_only_then(bits):
    model, x = net(bits), torch.randn(6, 5, bits * 3)
    census = CodeCensus(model, 30)
    census.batch(torch.ones(6, 5, dtype=torch.bool))
    with torch.inference_mode(), census.watching():
        out = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), out)
    first, second = census.total(ALONE)
    assert (first.name, second.name, first.num_tables, first.bits) == ("first", "second", 3, bits)
    assert first.num_tokens == second.num_tokens == 30
    assert np.array_equal(first.hits, hits_of(x.flatten(0, 1), bits))
    with torch.no_grad():
        assert np.array_equal(second.hits, hits_of(model[:2](x).flatten(0, 1), bits))
    scores = (1 / (1 + np.exp(-2 * np.abs(x.numpy().reshape(-1, bits))))).prod(1)
    edges = 2.0 ** (LOWEST_OCTAVE + np.flatnonzero(first.scores) / BUCKETS_AN_OCTAVE)
    assert first.scores.sum() == len(scores) == 90
    assert edges[0] <= scores.min() * 1.001 and edges[-1] >= scores.max() / 2 ** (1 / BUCKETS_AN_OCTAVE) / 1.001


def test_padding_is_not_counted():
    model, x = net(), torch.randn(3, 4, 12)
    is_real = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    census = CodeCensus(model, 12)
    census.batch(is_real)
    with torch.no_grad(), census.watching():
        model(x)
    assert np.array_equal(census.total(ALONE)[0].hits, hits_of(x[is_real], 4))


def test_many_tokens_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(code_census, "MAX_TOKENS", 20)
    model, batches = net(), [torch.randn(7, 4, 12) for _ in range(3)]
    census = CodeCensus(model, 84)  # every fifth of 21 sequences
    with torch.no_grad(), census.watching():
        for x in batches:
            census.batch(torch.ones(x.shape[:2], dtype=torch.bool))
            model(x)
    chosen = torch.cat(batches)[::5].flatten(0, 1)
    assert np.array_equal(census.total(ALONE)[0].hits, hits_of(chosen, 4))


def test_of_a_large_layer_some_tables_are_counted(monkeypatch):
    monkeypatch.setattr(code_census, "MAX_ROWS", 40)
    model, x = net(bits=4, tables=5), torch.randn(9, 1, 20)
    census = CodeCensus(model, 9)
    census.batch(torch.ones(9, 1, dtype=torch.bool))
    with torch.no_grad(), census.watching():
        model(x)
    counts = census.total(ALONE)[0]
    assert (counts.num_tables, counts.tables) == (5, (0, 3))
    assert np.array_equal(counts.hits, hits_of(x.flatten(0, 1), 4)[[0, 3]])


def test_scores_that_are_not_finite_do_not_break_it():
    model = net()
    x = torch.randn(2, 1, 12)
    x[0, 0, 0], x[1, 0, 5] = float("nan"), float("inf")
    census = CodeCensus(model, 2)
    census.batch(torch.ones(2, 1, dtype=torch.bool))
    with torch.no_grad(), census.watching():
        model(x)
    assert all(counts.scores.sum() == 6 for counts in census.total(ALONE))


def test_a_model_without_memory_layers_has_nothing_to_count():
    census = CodeCensus(nn.Linear(4, 4), 8)
    census.batch(torch.ones(2, 4, dtype=torch.bool))
    assert census.total(ALONE) == []

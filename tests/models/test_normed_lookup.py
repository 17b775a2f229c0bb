"""A memory layer with its norm and its residual: the modules one after the other, or on a GPU one kernel."""

import pytest
import torch
from torch import nn

from mfdist.layers import MemoryLayer
from mfdist.models.normed_lookup import normed_lookup


def made(kind, device="cpu", **options):
    torch.manual_seed(0)
    norm = {"rms": nn.RMSNorm(24, **options), "layer": nn.LayerNorm(24, **options)}[kind]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.to(device), MemoryLayer(24, 40, bits=8, std=1.0).to(device), torch.randn(2, 3, 24, device=device)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_it_is_the_modules_one_after_the_other(kind):
    norm, layer, x = made(kind)
    residual = torch.randn(2, 3, 40)
    expected = layer(norm(x))
    assert torch.equal(normed_lookup(norm, layer, x), expected)
    assert torch.equal(normed_lookup(norm, layer, x, residual=residual), residual + expected)
    with torch.no_grad():
        assert torch.equal(normed_lookup(norm, layer, x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_one_kernel_gives_the_same(kind, options, monkeypatch):
    norm, layer, x = made(kind, "cuda", **options)
    x, residual = x.view(6, 1, 24), torch.randn(6, 1, 40, device="cuda")
    expected = residual + layer(norm(x))
    monkeypatch.delattr(MemoryLayer, "forward")
    with torch.no_grad():
        for times in (1, 20):  # for more tokens than one kernel is for, too
            got = normed_lookup(norm, layer, x.repeat(times, 1, 1), residual=residual.repeat(times, 1, 1))
            torch.testing.assert_close(got, expected.repeat(times, 1, 1), rtol=1e-4, atol=1e-4)

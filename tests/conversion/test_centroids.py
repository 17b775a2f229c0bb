"""What rows are fitted to: cases whose answer is known, and an oracle in numpy for one of them."""

import numpy as np
import pytest
import torch

from mfdist.addressing.sign_hash import SignHash
from mfdist.conversion import centroids
from mfdist.conversion.converted_linear import ConvertedLinear
from mfdist.layers import MemoryLayer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answered(x, found, address):
    """Return what a memory layer with the fitted rows gives, less its bias."""
    layer = MemoryLayer(address.in_features, found.rows.shape[1], address.bits, bias=False, temperature=2.0)
    made = ConvertedLinear(layer)
    with torch.no_grad():
        layer.table.weight.copy_(found.rows)
        made.shift.copy_(found.mean)
        made.inverse_scale.copy_(1 / found.scale)
        return made(x)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_activations_of_two_values_are_answered_exactly(bits):
    """Their signs say all: neither the score nor the mean loses anything."""
    signs = torch.where(normal(900, 12) > 0.3, 1.0, -1.0)
    x = signs * normal(12, seed=1).abs().add(0.1) + normal(12, seed=2)
    weight = normal(7, 12, seed=3)
    address = SignHash(in_features=12, bits=bits, temperature=2.0)
    found = centroids.fit(x, weight, address)
    assert found.error < 0.03  # a code counts as if one more token had it
    expected = (x - found.mean) @ weight.T
    assert (answered(x, found, address) - expected).norm() < 0.03 * expected.norm()


def test_the_reported_error_is_that_of_the_layer_on_other_tokens():
    x, weight = normal(4000, 32) @ normal(32, 32, seed=1) + 0.5, normal(16, 32, seed=2)
    address = SignHash(in_features=32, bits=4, temperature=2.0)
    found = centroids.fit(x[:3000], weight, address)
    expected = (x[3000:] - found.mean) @ weight.T
    error = (answered(x[3000:], found, address) - expected).norm() / expected.norm()
    assert found.error == pytest.approx(error.item(), abs=0.03)
    assert found.error < 0.7


def test_rows_without_mixing_are_the_centroids_of_their_codes(monkeypatch):
    monkeypatch.setattr(centroids, "_RIDGES", (torch.inf,))
    monkeypatch.setattr(centroids, "_PRIOR_TOKENS", 1e-9)
    x, weight = normal(600, 6), normal(5, 6, seed=1)
    address = SignHash(in_features=6, bits=3, temperature=2.0)
    found = centroids.fit(x, weight, address)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))[180:]
    z = ((x[order] - found.mean) / found.scale).double().numpy()
    scaled = (weight * found.scale).double().numpy()
    for table in range(2):
        chunk = z[:, 3 * table : 3 * table + 3]
        scores = 1 / np.prod(1 + np.exp(-2 * np.abs(chunk) / 2.0), axis=1)
        codes = (chunk >= 0) @ np.array([4, 2, 1])
        for code in range(8):
            mine = codes == code
            assert mine.any()
            centroid = (scores[mine, None] * chunk[mine]).sum(0) / (scores[mine] ** 2).sum()
            row = scaled[:, 3 * table : 3 * table + 3] @ centroid
            np.testing.assert_allclose(found.rows[8 * table + code].numpy(), row, rtol=1e-4, atol=1e-5)


def test_a_code_that_no_token_has_answers_as_its_signs_do():
    x = normal(800, 8).abs() * torch.where(normal(800, 1, seed=1) > 0, 1.0, -1.0)  # all signs of a token are alike
    weight = normal(5, 8, seed=2)
    address = SignHash(in_features=8, bits=8, temperature=2.0)
    found = centroids.fit(x, weight, address)
    assert found.hit_share < 0.1
    # A token of mixed signs is answered in its direction, though none was there.
    mixed = x.abs() * torch.where(normal(800, 8, seed=3) > 0, 1.0, -1.0)
    expected = mixed @ weight.T
    assert torch.cosine_similarity(answered(mixed, found, address), expected, dim=1).mean() > 0.5


def test_what_chunks_tell_of_each_other_is_used(monkeypatch):
    x, weight = normal(6000, 8) @ normal(8, 64, seed=1) + 0.3 * normal(6000, 64, seed=2), normal(32, 64, seed=3)
    address = SignHash(in_features=64, bits=8, temperature=2.0)
    together = centroids.fit(x, weight, address).error
    monkeypatch.setattr(centroids, "_RIDGES", (torch.inf,))
    alone = centroids.fit(x, weight, address).error
    assert together < 0.7 * alone

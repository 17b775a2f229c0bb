"""SignHash against the paper's definitions, pattern by pattern."""

import itertools
import math

import pytest
import torch

from mfdist.addressing.sign_hash import SignHash


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_score_is_the_softmax_over_all_sign_patterns(temperature):
    """Equation 9, of which equation 10 is the closed form that the kernels compute."""
    x = torch.randn(7, 5, dtype=torch.float64)
    codes, scores = SignHash(in_features=5, bits=5, temperature=temperature)(x)
    for n, chunk in enumerate(x.tolist()):
        logits = {
            pattern: sum(sign * z for sign, z in zip(pattern, chunk, strict=True)) / temperature
            for pattern in itertools.product((-1, 1), repeat=5)
        }
        own = tuple(1 if z >= 0 else -1 for z in chunk)
        softmax = math.exp(logits[own]) / sum(map(math.exp, logits.values()))
        assert scores[n, 0].item() == pytest.approx(softmax, rel=1e-5)
        # product() counts up with the last place fastest, so a pattern's place in it is the code, first sign highest.
        assert codes[n, 0].item() == list(logits).index(own)


def test_expected_scores_of_normal_activations():
    """The scale of the two scores: p alone shrinks a layer's output, ‖z‖₁·p keeps it."""
    x = torch.randn(20_000, 8)
    means = {score: SignHash(in_features=8, score=score)(x)[1].mean().item() for score in ("paper", "released")}
    assert means["paper"] == pytest.approx(0.134, rel=0.02)
    assert means["released"] == pytest.approx(0.967, rel=0.02)


def test_codes_are_spread_evenly_over_normal_activations():
    codes, _ = SignHash(in_features=16, bits=4)(torch.randn(16_000, 16))
    counts = torch.stack([torch.bincount(codes[:, k].long(), minlength=16) for k in range(4)])
    assert counts.sum() == 64_000 and (counts - 1000).abs().max() < 200


@pytest.mark.parametrize(
    ("bits", "dtype"), [(1, torch.uint8), (8, torch.uint8), (9, torch.uint16), (16, torch.uint16), (17, torch.int32)]
)
def test_codes_come_in_their_compact_form(bits, dtype):
    hash_ = SignHash(in_features=bits * 2, bits=bits)
    codes, scores = hash_(torch.ones(3, bits * 2))
    assert codes.dtype == dtype and scores.dtype == torch.float32
    assert (codes.long() == hash_.code_stride - 1).all() and hash_.num_rows == 2 * 2**bits

"""What sign_hash computes, in plain torch: slow, in any floating dtype, and obviously right."""

import torch
from torch import Tensor


def sign_hash(x: Tensor, bits: int, score: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Return int64 codes [N, K] and scores [N, K] in x's dtype."""
    chunks = x.reshape(x.shape[0], x.shape[1] // bits, bits)
    places = 1 << torch.arange(bits - 1, -1, -1, device=x.device)
    codes = ((chunks >= 0) * places).sum(-1)
    scores = _certainty(chunks, temperature)
    if score == "released":
        scores = chunks.abs().sum(-1) * scores
    return codes, scores


def sign_hash_gradient(x: Tensor, grad_scores: Tensor, bits: int, score: str, temperature: float) -> Tensor:
    """Return the gradient [N, d] of `x` in its dtype; the slope of |z| at 0 is 0."""
    chunks = x.reshape(x.shape[0], x.shape[1] // bits, bits)
    p = _certainty(chunks, temperature).unsqueeze(-1)
    slope = p * (2 / temperature) * torch.sigmoid(-2 / temperature * chunks.abs())
    if score == "released":
        slope = p + chunks.abs().sum(-1, keepdim=True) * slope
    return (grad_scores.to(x.dtype).unsqueeze(-1) * chunks.sign() * slope).flatten(1)


def _certainty(chunks: Tensor, temperature: float) -> Tensor:
    factors: Tensor = torch.sigmoid(2 / temperature * chunks.abs())
    return factors.prod(-1)

"""Rows that answer as a matrix does: the centroids of a layer's activations, as the matrix maps them.

Letters: N tokens, d activations, K = d / bits chunks, S = 2^bits codes, D outputs.

A memory layer cannot see more of a token than its codes and scores. So it is fitted in two steps, both least squares:
- each chunk by itself: z_k ≈ s_k · m_k[code_k], where m_k[c] = Σ s·z / Σ s² over the tokens with code c. A code that
  few tokens have is drawn to the centroids of its signs alone, and one that none has is those.
- what chunks tell of each other: z ≈ B · ẑ, B [d, d] by ridge regression of the activations on their approximations ẑ.
  Activations of real models are correlated, and each chunk's bits then help with all others.
The row of code c in table k is W · B[:, k] · m_k[c]. No array larger than [N, d], [d, d] and the table is made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist.addressing.sign_hash import SignHash

#: A code counts as if this many more tokens had its signs and average magnitudes.
_PRIOR_TOKENS = 1.0
#: How strongly B is drawn to the identity, in mean variances of ẑ; the one that does best on other tokens is taken.
_RIDGES = (0.003, 0.03, 0.3, 3.0, 30.0, torch.inf)
#: Shares of the tokens that are kept out of the fit: to choose the ridge by, and to report the error on.
_CHOOSE_SHARE = _REPORT_SHARE = 0.15


@dataclass(frozen=True)
class CentroidFit:
    """What a memory layer needs to stand in for a matrix, and how well it does."""

    mean: Tensor  # [d], of the activations
    scale: Tensor  # [d], their standard deviations
    rows: Tensor  # [K·S, D]
    error: float  # ‖y − ŷ‖ / ‖y‖ over tokens that were not fitted, biases left out of y
    hit_share: float  # rows that a fitted token reads


@torch.no_grad()
def fit(x: Tensor, weight: Tensor, address: SignHash) -> CentroidFit:
    """Return rows whose weighted sums come closest to x · weightᵀ.

    Args:
        x: [N, d] fp32, the layer's own activations on sample text.
        weight: [D, d], the matrix.
        address: codes and scores of standardised activations.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    num_report, num_choose = (max(1, int(len(x) * share)) for share in (_REPORT_SHARE, _CHOOSE_SHARE))
    reported, choosing = x[order[:num_report]], x[order[num_report : num_report + num_choose]]
    fitted = x[order[num_report + num_choose :]]
    mean, scale = fitted.mean(0), fitted.std(0).clamp_min(1e-6 * fitted.std().clamp_min(1e-30))
    matrix = weight.float() * scale

    chunks = _Chunks((fitted - mean) / scale, address)
    mixing, eigenvalues, vectors = chunks.correlation()
    choices = []
    for ridge in _RIDGES:
        mixed = matrix @ _mixing(mixing, eigenvalues, vectors, ridge)
        choices.append((chunks.error((choosing - mean) / scale, matrix, mixed), mixed))
    mixed = min(choices, key=lambda choice: choice[0])[1]
    return CentroidFit(
        mean=mean,
        scale=scale,
        rows=chunks.rows(mixed),
        error=chunks.error((reported - mean) / scale, matrix, mixed),
        hit_share=chunks.hit_share,
    )


class _Chunks:
    """The centroids of every chunk's codes, fitted to standardised activations z [N, d]."""

    def __init__(self, z: Tensor, address: SignHash) -> None:
        self._z, self._address = z, address
        num_tables, stride, bits = address.num_tables, address.code_stride, address.bits
        self._slots, self._scores = self._addressed(z)
        flat = self._slots.flatten()
        weighted = (self._scores[..., None] * z.view(-1, num_tables, bits)).view(-1, bits)
        products = z.new_zeros(num_tables * stride, bits).index_add_(0, flat, weighted)
        squares = z.new_zeros(num_tables * stride).index_add_(0, flat, self._scores.square().flatten())
        self.hit_share = float((squares > 0).float().mean())
        expected, score = self._of_signs()
        prior = _PRIOR_TOKENS * score.square()
        self._centroids = (products + (prior / score)[:, None] * expected) / (squares + prior)[:, None]

    def correlation(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return zᵀẑ / N, and the eigenvalues and vectors of ẑᵀẑ / N."""
        approximation = self._approximation(self._slots, self._scores)
        eigenvalues, vectors = torch.linalg.eigh(approximation.T @ approximation / len(approximation))
        return self._z.T @ approximation / len(approximation), eigenvalues, vectors

    def error(self, z: Tensor, matrix: Tensor, mixed: Tensor) -> float:
        """Return how far ẑ · mixedᵀ lies from z · matrixᵀ, relative to the latter's length."""
        exact = z @ matrix.T
        difference = self._approximation(*self._addressed(z)) @ mixed.T - exact
        return float(difference.norm() / exact.norm().clamp_min(1e-30))

    def rows(self, mixed: Tensor) -> Tensor:
        """Return the table [K·S, D] whose sums are ẑ · mixedᵀ."""
        num_tables, bits = self._address.num_tables, self._address.bits
        by_chunk = mixed.T.reshape(num_tables, bits, -1)
        return torch.bmm(self._centroids.view(num_tables, -1, bits), by_chunk).view(self._address.num_rows, -1)

    def _addressed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [N, K] of all tables together, and scores [N, K]."""
        codes, scores = self._address(z)
        first = torch.arange(self._address.num_tables, device=z.device) * self._address.code_stride
        return codes.long() + first, scores

    def _approximation(self, slots: Tensor, scores: Tensor) -> Tensor:
        return (scores[..., None] * self._centroids[slots]).view(len(slots), -1)

    def _of_signs(self) -> tuple[Tensor, Tensor]:
        """Return what each code's signs say of its chunk, [K·S, bits], and the score that has, [K·S]."""
        num_tables, stride, bits = self._address.num_tables, self._address.code_stride, self._address.bits
        is_high = self._z >= 0
        high, low = (torch.where(side, self._z, 0).sum(0) / side.sum(0).clamp_min(1) for side in (is_high, ~is_high))
        place = torch.arange(bits - 1, -1, -1, device=self._z.device)  # the first activation gives the highest bit
        signs = (torch.arange(stride, device=self._z.device)[:, None] >> place & 1).bool()
        expected = torch.where(signs, high.view(num_tables, 1, bits), low.view(num_tables, 1, bits))
        alone = SignHash(in_features=bits, bits=bits, score=self._address.score, temperature=self._address.temperature)
        _, score = alone(expected.reshape(-1, bits))
        return expected.view(-1, bits), score.flatten().clamp_min(1e-6)


def _mixing(mixing: Tensor, eigenvalues: Tensor, vectors: Tensor, ridge: float) -> Tensor:
    """Return B [d, d], which minimises |z − Bẑ|² + ρ|B − 1|² for ρ = ridge mean variances."""
    if ridge == torch.inf:
        return torch.eye(len(mixing), device=mixing.device)
    strength = ridge * eigenvalues.mean()
    inverse = (vectors / (eigenvalues.clamp_min(0) + strength)) @ vectors.T
    return (mixing + strength * torch.eye(len(mixing), device=mixing.device)) @ inverse

"""MemoryFormer's addressing: the sign bits of each chunk are its code.

Source: MemoryFormer (arXiv 2411.12992), equations 4–10. A chunk z of τ = `bits` activations has the code whose bits are
z_i ≥ 0, the first activation giving the highest bit as in the authors' released code (the paper writes the lowest
first).
"""

from dataclasses import dataclass

from torch import Tensor

from mfdist.config import MAX_BITS
from mfdist.errors import ConfigError
from mfdist.kernels import sign_hash

SCORES = ("paper", "released")


@dataclass(frozen=True, kw_only=True)
class SignHash:
    """Addresses K = in_features / bits tables of 2^bits rows, one row of each a token.

    Args:
        in_features: width d of the activations, a multiple of `bits`.
        bits: τ, sign bits a chunk, 1 to 24.
        score: `paper`, p(z) = 1 / Π(1 + exp(−2|z_i|/t)); or `released`, ‖z‖₁ · p(z).
        temperature: t.

    Raises:
        ConfigError: a value is out of range, or `bits` does not divide `in_features`.
    """

    in_features: int
    bits: int = 8
    score: str = "paper"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ConfigError(f"bits must lie in 1..{MAX_BITS}; got {self.bits}")
        if self.in_features < 1 or self.in_features % self.bits:
            raise ConfigError(
                f"in_features must be a positive multiple of bits; got in_features={self.in_features}, "
                f"bits={self.bits}; nearest that fit: {_nearest_multiples(self.in_features, self.bits)}"
            )
        if self.score not in SCORES:
            raise ConfigError(f'score must be one of {", ".join(SCORES)}; got "{self.score}"')
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive; got {self.temperature}")

    @property
    def num_tables(self) -> int:
        """Return K, the rows read a token."""
        return self.in_features // self.bits

    @property
    def code_stride(self) -> int:
        """Return the rows each of the K tables owns, 2^bits."""
        return 1 << self.bits

    @property
    def num_rows(self) -> int:
        """Return the rows of all K tables laid one after another."""
        return self.num_tables * self.code_stride

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes [N, K] and fp32 scores [N, K] of activations x [N, d].

        Gradients reach x through the scores only. A NaN activation gives bit 0 and a NaN score, so that it shows in
        the output; an infinite one counts as certain (its factor of p is 1).
        """
        return sign_hash(x, self.bits, self.score, self.temperature)


def _nearest_multiples(size: int, bits: int) -> str:
    below = size // bits * bits
    return " and ".join(str(value) for value in (below, below + bits) if value)

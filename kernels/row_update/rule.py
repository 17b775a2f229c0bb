"""What a row optimiser does with the gradient g of a row w, as data.

All rules decay touched rows by themselves, w ← (1 − lr · weight_decay) · w, and leave a row alone whose gradient is not
finite. t counts updates from 1.

- `sgd`: w ← w − lr · g
- `rowwise_adagrad`: a ← a + mean(g²), one a a row; w ← w − lr · g / (√a + eps). With β₂ < 1, where a does not grow for
  ever: a ← β₂a + (1 − β₂) · mean(g²), which begins as mean(g²)
- `adam`: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g²; w ← w − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps)

bf16 rows and states are rounded up or down at random, so that small updates count on average. The random bits follow
from (seed, t, stream, row, column) in the whole table's numbers, by integer arithmetic that is the same everywhere:

    key(stream)  = mix64(mix64(seed) + 4·t + stream)        stream 0 for w, 1 for m, 2 for v
    key(row)     = mix64(key(stream) + row · 0x9E3779B97F4A7C15) >> 32
    random       = mix32(key(row) + column · 0x9E3779B9)
    rounded(x)   = the high half of (x as a 32-bit word + (random >> 16))

m and v may also be kept in a byte each: m · 2¹⁴ as e5m2, and √v · 2¹⁴, which has no sign, with a third bit of fraction.
So a byte shifted left by 8, or by 7 for √v, is the word of an fp16 number. Above 3.5 both are kept as 3.5; below 2⁻²⁸
bytes are evenly spaced, by 2⁻³⁰ or for √v by 2⁻³¹. fp32 values are rounded to bytes at once, for an fp16 number on the
way would mistake what β₂ = 0.999 takes off √v:

    x            = min(|value|, 3.5)
    place(x)     = (x as a word + 2²³, or where x < 2⁻²⁸ (x + 2⁻²⁸) as a word) − (2⁻²⁸ as a word)
    byte(x)      = (place(x) + (random >> 11)) >> 21, and the sign in the high bit; of √v by >> 12 and >> 20

mix64 is SplitMix64's last step (Steele, Lea, Flood 2014), mix32 an integer hash of the same form by Wellons (2018).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mfdist.errors import ConfigError

Kind = Literal["sgd", "rowwise_adagrad", "adam"]


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """One rule with the settings that stay the same from step to step; the rate and t are tensors beside it.

    Raises:
        ConfigError: a setting is out of range.
    """

    kind: Kind
    weight_decay: float = 0.0
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f'a row rule must be one of {", ".join(get_args(Kind))}; got "{self.kind}"')
        most = 1.0 if self.kind == "rowwise_adagrad" else 1.0 - 2.0**-53
        if not (self.weight_decay >= 0 and self.eps >= 0 and all(0 <= beta <= most for beta in self.betas)):
            raise ConfigError(
                "a row rule needs weight_decay >= 0, eps >= 0 and betas in [0, 1), or 1 in Adagrad; got "
                f"weight_decay={self.weight_decay}, eps={self.eps}, betas={self.betas}"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"the seed of stochastic rounding must lie in [0, 2**63); got {self.seed}")

    @property
    def accumulation(self) -> tuple[float, float]:
        """Return by what row-wise Adagrad multiplies what it has accumulated, and the next mean square."""
        beta = self.betas[1]
        return (beta, 1 - beta) if beta < 1 else (1.0, 1.0)

    @property
    def num_states(self) -> int:
        """Return how many state tensors the rule keeps."""
        return {"sgd": 0, "rowwise_adagrad": 1, "adam": 2}[self.kind]

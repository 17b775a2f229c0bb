"""Row optimisers as settings: the rule, its numbers, and which states it keeps beside the rows.

All update the rows that were looked up and no others, decay them by `weight_decay` times the rate, and leave a row as
it is whose gradient is not finite. bf16 rows and states are rounded stochastically by bits that follow from `seed`, the
number of the update, row and column alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from mfdist.errors import ConfigError
from mfdist.kernels.row_update import RowRule

#: What configurations call what Adam keeps its moments in → the dtype of the states.
STATE_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


class StateSpec(NamedTuple):
    """What one state is beside rows [R, D]."""

    is_per_row: bool  # [R], else [R, D]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class RowOptimizer(ABC):
    """What every row optimiser is told.

    Args:
        lr: learning rate to begin with.
        weight_decay: decoupled decay of the rows that are looked up.
        seed: of stochastic rounding; give each table its own.

    Raises:
        ConfigError: a number is out of range.
    """

    lr: float
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ConfigError(f"a learning rate must be 0 or more; got {self.lr}")
        _ = self.rule  # which checks the rest

    @property
    @abstractmethod
    def rule(self) -> RowRule:
        """Return the rule as the kernels take it."""

    @property
    @abstractmethod
    def states(self) -> Mapping[str, StateSpec]:
        """Return the states by name, in the rule's order."""


@dataclass(frozen=True, kw_only=True)
class RowSGD(RowOptimizer):
    """w ← w − lr · g; keeps nothing."""

    @property
    def rule(self) -> RowRule:
        """Return the rule as the kernels take it."""
        return RowRule(kind="sgd", weight_decay=self.weight_decay, seed=self.seed)

    @property
    def states(self) -> Mapping[str, StateSpec]:
        """Return the states by name: none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class RowAdagrad(RowOptimizer):
    """a ← a + mean(g²), w ← w − lr · g / (√a + eps): four bytes a row.

    Args:
        lr: learning rate to begin with.
        weight_decay: decoupled decay of the rows that are looked up.
        seed: of stochastic rounding.
        eps: added to the root.
        decay: in (0, 1]; below 1, a ← decay · a + (1 − decay) · mean(g²), which begins as mean(g²) and does not grow
            for ever: rates are then Adam's, and not Adagrad's.
    """

    eps: float = 1e-8
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ConfigError(f"Adagrad's decay must lie in (0, 1]; got {self.decay}")

    @property
    def rule(self) -> RowRule:
        """Return the rule as the kernels take it."""
        betas = (0.0, self.decay)
        return RowRule(
            kind="rowwise_adagrad", weight_decay=self.weight_decay, eps=self.eps, betas=betas, seed=self.seed
        )

    @property
    def states(self) -> Mapping[str, StateSpec]:
        """Return the states by name: the sums of mean squares."""
        return {"accumulator": StateSpec(True, torch.float32)}


@dataclass(frozen=True, kw_only=True)
class RowAdam(RowOptimizer):
    """Adam with both moments of touched rows alone, corrected by the number of all updates.

    Args:
        lr: learning rate to begin with.
        weight_decay: decoupled decay, as AdamW's, of the rows that are looked up.
        seed: of stochastic rounding.
        betas: decay of the two moments, which do not decay while their row is not looked up.
        eps: added to the root of the second moment.
        state_dtype: the moments': fp32, bf16, or uint8 for a byte each: m and √v with few bits, between 2⁻³¹ and 3.5;
            see `mfdist.kernels.row_update.rule`. What is below is now 0 and now 2⁻³¹, so leave eps near 1e-8 or above.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dtype not in STATE_DTYPES.values():
            raise ConfigError(
                f"Adam's moments must be kept in fp32, bf16 or uint8 (a byte each); got {self.state_dtype}"
            )

    @property
    def rule(self) -> RowRule:
        """Return the rule as the kernels take it."""
        return RowRule(kind="adam", weight_decay=self.weight_decay, eps=self.eps, betas=self.betas, seed=self.seed)

    @property
    def states(self) -> Mapping[str, StateSpec]:
        """Return the states by name: the two moments."""
        return {name: StateSpec(False, self.state_dtype) for name in ("exp_avg", "exp_avg_sq")}

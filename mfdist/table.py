"""The one interface behind every memory layer: a table of rows that can be looked up.

Call order: any number of lookups (`table(row_ids, scores)`), each followed or not by a backward. A lookup changes
nothing and may be repeated. Local, sharded and remote tables are interchangeable under a `MemoryLayer`.

Rows are trained in one of two ways. As they are made, backward gives them a gradient (`weight.grad`) for any optimiser.
After `fuse(optimizer)` backward updates them itself, and no gradient of the rows ever exists.

Shape letters: N tokens, K lookups a token, R rows, D row width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mfdist.optim import RowOptimizer, RowState
from mfdist.spec import Region, TableSpec


def autocast_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """Return what autocast computes in on a device; None where it is off, as it always is on the meta device.

    Given the dtype of what would be cast, None for fp64 too, which autocast leaves alone.
    """
    kind = device.type
    is_on = kind != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


class Table(nn.Module, ABC):
    """A logical array of R rows of width D whose forward is the weighted lookup."""

    def __init__(self, spec: TableSpec) -> None:
        super().__init__()
        self.spec = spec
        #: What trains the rows in backward, with its states; None where that is left to an optimiser outside.
        self.row_state: RowState | None = None
        #: What the first rows were drawn from, N(0, std²) by this seed; None where they were not drawn.
        self.seed: int | None = None
        self.std = 0.0

    @property
    def region(self) -> Region:
        """Return the part of the table that `weight` holds in this process."""
        return self.spec.region

    def fuse(self, optimizer: RowOptimizer | None) -> Self:
        """Train the rows in every backward from now on, or, given None, by an optimiser outside again.

        Each backward of a lookup is one update, of the rows that it read, at the rate `row_state.lr`; so each
        micro-batch is one. `weight.grad` stays None, gradients cannot be clipped, and score gradients are those of the
        rows before the update. Two lookups with both backwards still to come cannot be in one graph: torch refuses
        the second backward, since the rows are no longer those that were read. Any backward is one, in evaluation mode
        and of `torch.autograd.grad` too. A fused table is frozen by looking up under `torch.no_grad`, or by
        `fuse(None).requires_grad_(False)`; `requires_grad_(False)` alone changes nothing, for rows have it already.

        Args:
            optimizer: settings; states begin at zero, also where the table was fused before.

        Returns:
            The table itself.

        Called on: every process that holds a part of the table, between steps.
        Cost: the states' memory; see the optimiser.
        """
        weight = self.get_parameter("weight")
        self.row_state = None if optimizer is None else RowState(optimizer, weight, self.region)
        weight.grad = None
        weight.requires_grad_(optimizer is None)
        return self

    @property
    def resident_rows(self) -> Tensor | None:
        """Return the rows [R, D] where all of them lie in this process as a lookup reads them, and else None.

        What only reads may then look rows up without going through `forward`.
        """
        return None

    @abstractmethod
    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the score-weighted sum of K rows for each token: out[n] = Σ_k scores[n, k] · row[id[n, k]].

        Args:
            row_ids: [N, K], an integer dtype; N and K may be 0; repeated ids add up. With `code_stride` S > 0 they are
                codes in [0, S) and the row of slot k is k·S + code, so that codes travel in their compact form.
            scores: [N, K], fp32.
            code_stride: rows a slot owns, or 0 where `row_ids` are row ids in [0, R).

        Returns:
            [N, D] in the table's dtype, or in autocast's where that is on; summed in fp32 in the order k = 0..K-1.
            Differentiable in the scores and in the rows.

        Raises:
            RowIdError: an id lies outside the table; nothing was read. On a GPU it may be raised by a later call.

        Called on: any thread of the process that holds the table; concurrent lookups are safe.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let the row optimiser's states follow the rows to another device."""
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.row_state is not None:
            self.row_state.move(fn)
        return applied

    def extra_repr(self) -> str:
        """Return the spec as shown by `print(model)`."""
        spec = self.spec
        dtype = str(spec.dtype).removeprefix("torch.")
        fused = "" if self.row_state is None else f", fuse={self.row_state.optimizer}"
        return f'"{spec.name}", num_rows={spec.num_rows}, row_dim={spec.row_dim}, dtype={dtype}{fused}'

"""What a route is: a lookup and its gradient in a table of which this rank holds a part.

Letters: n this rank's tokens, N all ranks' tokens in the order of the ranks, K lookups a token, W ranks, D row width;
R and d the rows and columns this rank holds.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfdist.errors import MfdistError
from mfdist.optim import RowState
from mfdist.sharding.tags import Call

if TYPE_CHECKING:
    from mfdist.kernels.row_gradient.triton_ordered import Ordered


@dataclass(frozen=True)
class LookupArguments:
    """A lookup as `Table.forward` takes it.

    Args:
        row_ids: [n, K].
        scores: [n, K] fp32.
        code_stride: see `Table.forward`.
        dtype: what sums are rounded to in the end, where it is not the rows' own. A route may give them in it whose
            sums are whole before they travel.
        refusal: why this rank cannot take part, where that is known already.
    """

    row_ids: Tensor
    scores: Tensor
    code_stride: int
    dtype: torch.dtype | None = None
    refusal: MfdistError | None = None

    @property
    def num_tokens(self) -> int:
        """Return n; 0 where the ids are not [n, K], which is refused."""
        return self.row_ids.shape[0] if self.row_ids.ndim == 2 else 0

    @property
    def num_lookups(self) -> int:
        """Return K; 0 where the ids are not [n, K], which is refused."""
        return self.row_ids.shape[1] if self.row_ids.ndim == 2 else 0

    def call(self, table: str, kind: str) -> Call:
        """Return what other ranks must be doing while this one makes the lookup."""
        return Call(
            table=table,
            kind=kind,
            phase="lookup",
            num_lookups=self.num_lookups,
            code_stride=self.code_stride,
            id_bytes=self.row_ids.element_size(),
            values=str(self.dtype).removeprefix("torch.") if self.dtype else "",
        )


@dataclass(frozen=True)
class Kept:
    """What a lookup leaves for its gradient: tensors, which autograd keeps, and what else the route needs.

    `ordered` is what was made of the lookup while its gradient was on its way; see `LocalRoute.ordered`.
    """

    tensors: tuple[Tensor, ...] = ()
    others: Any = None
    ordered: "Ordered | None" = None


@dataclass(frozen=True)
class RowGradient:
    """Gradient of the rows this rank holds: of all of them, or of those that were looked up, the others' being zero."""

    values: Tensor  # [R, d] in the table's dtype, or [U, d]
    row_ids: Tensor | None = field(default=None)  # [U] int64, ascending, counted from the first row held


class Route(ABC):
    """A way for a lookup through the ranks; all ranks of its exchange call it in the same order."""

    @abstractmethod
    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return this rank's sums [n, D], in weight.dtype or lookup.dtype; where `is_training`, what `backward` needs.

        Args:
            weight: [R, d], the part of the table that this rank holds.
            lookup: this rank's; n may differ from rank to rank, K may not.
            is_training: a gradient may be asked for.

        Raises:
            RowIdError: an id lies outside the table; the other ranks get a ConsistencyError.
            UnavailableError, ConsistencyError: see `Exchange`.
        """

    @abstractmethod
    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradient of the held rows, summed over all ranks, and that of this rank's scores [n, K].

        Args:
            weight: as it was in `forward`.
            kept: from `forward`.
            grad_output: [n, D], of this rank's sums, in their dtype or a wider one.
            must_list: give the gradients of the rows that were looked up, on any rank, and no others; in fp32, or the
                table's dtype where that is wider.
        """

    @abstractmethod
    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the held rows in place by their gradient; return that of this rank's scores [n, K].

        Args:
            weight: as it was in `forward`.
            kept: from `forward`.
            grad_output: [n, D].
            state: what trains the rows of this rank.
        """

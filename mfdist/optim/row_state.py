"""A row optimiser at work on the part of a table that a process holds: its states and the numbers that change.

Shape letters: N tokens, K lookups a token, R rows and D columns of the part, U rows to update.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import fused_row_update, ragged_row_update, row_update, updating_gather_sum
from mfdist.optim.row_optimizer import RowOptimizer
from mfdist.spec import Region

if TYPE_CHECKING:
    from mfdist.kernels.row_gradient.triton_ordered import Ordered


class RowState:
    """The states of a row optimiser beside rows [R, D], its rate, and how many updates it has made.

    Either `lookup`, whose backward updates the rows, or `update` with gradients that are there already; each call of
    update and each backward is one update. Nothing here is a parameter or in a module's state dict; checkpoints save
    `tensors` and `num_updates`.

    Args:
        optimizer: the settings.
        rows: [R, D], for their shape, dtype and device.
        region: the part of the whole table that they are.
    """

    def __init__(self, optimizer: RowOptimizer, rows: Tensor, region: Region) -> None:
        self.optimizer = optimizer
        self.region = region
        exact = torch.float64 if rows.dtype == torch.float64 else None
        #: name → [R] or [R, D]; changed in place by every update.
        self.tensors = {
            name: torch.zeros(
                rows.shape[:1] if spec.is_per_row else rows.shape, dtype=exact or spec.dtype, device=rows.device
            )
            for name, spec in optimizer.states.items()
        }
        self._lr = torch.full((), optimizer.lr, dtype=torch.float32, device=rows.device)
        self._step = torch.zeros((), dtype=torch.int64, device=rows.device)
        self._anchor = torch.zeros((), device=rows.device, requires_grad=True)

    @property
    def lr(self) -> float:
        """Return the rate of the next update; on a GPU it waits for the device."""
        return float(self._lr)

    @lr.setter
    def lr(self, value: float) -> None:
        """Set the rate of the next updates, in compiled code and captured graphs too."""
        self._lr.fill_(value)

    @property
    def num_updates(self) -> int:
        """Return how many updates there were; on a GPU it waits for the device."""
        return int(self._step)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        """Go on from a number of updates, which decides Adam's correction and the random bits of the next one."""
        self._step.fill_(value)

    def reset(self) -> None:
        """Begin anew: states of zeros, no update made, the rate that the settings give."""
        for tensor in self.tensors.values():
            tensor.zero_()
        self.lr, self.num_updates = self.optimizer.lr, 0

    def load(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Take over saved states, in place.

        Raises:
            ConfigError: they are not this optimiser's, not of these shapes, or bytes where it keeps numbers or numbers
                where it keeps bytes; nothing was changed.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if shapes != wanted:
            raise ConfigError(
                f"states must be those of {type(self.optimizer).__name__}, {wanted}; got {shapes}; "
                "load them into the optimiser they were saved from"
            )
        for name, tensor in self.tensors.items():
            if (saved := tensors[name].dtype) != tensor.dtype and torch.uint8 in (saved, tensor.dtype):
                raise ConfigError(
                    f'state "{name}" must have been kept in {tensor.dtype}, for bytes are not numbers; got {saved}; '
                    "load it into an optimiser with the state_dtype it was saved from"
                )
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.num_updates = num_updates

    def lookup(self, rows: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int, name: str) -> Tensor:
        """Return the lookup [N, D] of rows [R, D]; its backward updates them by what they contributed.

        See `mfdist.kernels.updating_gather_sum`.
        """
        return updating_gather_sum(
            rows,
            list(self.tensors.values()),
            row_ids,
            scores,
            self.optimizer.rule,
            self._lr,
            self._step,
            self._anchor,
            row_offset=self.region.rows[0],
            column_offset=self.region.columns[0],
            code_stride=code_stride,
            name=name,
        )

    def update(
        self,
        rows: Tensor,
        grads: Tensor,
        *,
        touched: Tensor | None = None,
        mean_squares: Tensor | None = None,
        name: str = "table",
    ) -> None:
        """Update rows [R, D] in place by gradients that are there already.

        Args:
            rows: the rows.
            grads: [U, D], or [R, D] of which those of `touched` are used.
            touched: [U], the rows to update, rising, counted from this part's first; all of them where it is None.
            mean_squares: [U], over whole rows, where this part has not all columns; see `mfdist.kernels.row_update`.
            name: what errors call the table.
        """
        self._step.add_(1)
        if not rows.numel():  # a process without rows counts along
            return
        row_update(
            rows.detach(),
            list(self.tensors.values()),
            grads,
            self.optimizer.rule,
            self._lr,
            self._step,
            rows=touched,
            mean_squares=mean_squares,
            row_offset=self.region.rows[0],
            column_offset=self.region.columns[0],
            name=name,
        )

    def update_by_lookup(
        self,
        rows: Tensor,
        row_ids: Tensor,
        scores: Tensor,
        grad_output: Tensor,
        code_stride: int,
        name: str,
        ordered: "Ordered | None" = None,
    ) -> Tensor:
        """Update rows [R, D] in place by what a lookup contributed; return the gradient [N, K] of its scores.

        For backward passes that are written by hand; see `mfdist.kernels.fused_row_update`.
        """
        self._step.add_(1)
        if not rows.numel():
            return torch.zeros_like(scores)
        return fused_row_update(
            rows.detach(),
            list(self.tensors.values()),
            row_ids,
            scores,
            grad_output,
            self.optimizer.rule,
            self._lr,
            self._step,
            row_offset=self.region.rows[0],
            column_offset=self.region.columns[0],
            code_stride=code_stride,
            name=name,
            ordered=ordered,
        )

    def update_by_list(
        self,
        rows: Tensor,
        row_ids: Tensor,
        runs: Tensor,
        scores: Tensor,
        grad_output: Tensor,
        num_lookups: int,
        name: str,
    ) -> Tensor:
        """Update rows [R, D] in place by what listed lookups contributed; return the gradient [M] of their scores.

        See `mfdist.kernels.ragged_row_update`.
        """
        self._step.add_(1)
        if not rows.numel():  # a process without rows counts along
            return torch.zeros_like(scores)
        return ragged_row_update(
            rows.detach(),
            list(self.tensors.values()),
            row_ids,
            runs,
            scores,
            grad_output,
            num_lookups,
            self.optimizer.rule,
            self._lr,
            self._step,
            row_offset=self.region.rows[0],
            column_offset=self.region.columns[0],
            name=name,
        )

    @property
    def count(self) -> Tensor:
        """Return the number of updates as the tensor that each update changes in place."""
        return self._step

    @property
    def anchor(self) -> Tensor:
        """Return a tensor whose gradient nobody takes: given to a lookup, it makes backward run for the rows' sake."""
        return self._anchor

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow a module's move to another device; casts of the rows do not reach the states.

        What was on the meta device begins anew.
        """
        was_meta = self._lr.is_meta

        def moved(tensor: Tensor) -> Tensor:
            made = change(tensor.detach())
            return made if made.dtype == tensor.dtype else tensor.detach().to(made.device)

        self.tensors = {name: moved(tensor) for name, tensor in self.tensors.items()}
        self._lr, self._step = moved(self._lr), moved(self._step)
        self._anchor = moved(self._anchor).requires_grad_()
        if was_meta and not self._lr.is_meta:
            self.reset()

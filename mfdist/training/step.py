"""One optimiser step: micro-batches forward and backward, clipping, update."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mfdist.config import TrainingConfig
from mfdist.errors import NonFiniteError
from mfdist.models import Transformer
from mfdist.training.diagnosis import first_non_finite
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.world import SpreadModel, World


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured."""

    loss: float  # nats a token
    dense_grad_norm: float
    table_grad_norm: float | None  # None where tables are fused
    rates: dict[str, float]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which a model of this precision computes."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def token_loss(model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy in nats of targets [B, T] after inputs [B, T]; targets of -100 do not count."""
    return cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction=reduction, ignore_index=-100)


class TrainStep:
    """Runs optimiser steps of one model.

    A step whose loss or gradients are not finite raises before the update, so the parameters stay those of the step
    before; but for fused tables, whose rows are left alone one by one where their own gradients are not finite.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: RunOptimizer,
        config: TrainingConfig,
        device: torch.device,
        *,
        world: World | None = None,
        spread: SpreadModel | None = None,
    ) -> None:
        self._model = model
        self._world = world or World(device=device)
        self._spread = spread or self._world.alone(model)
        called: Any = self._spread.forward
        self._forward: Callable[[Tensor], Tensor] = torch.compile(called) if config.compile else called
        self._optimizer = optimizer
        self._config = config
        self._device = device

    def __call__(self, step: int, inputs: Tensor, targets: Tensor) -> StepResult:
        """Train on one batch, of which each rank has an equal part.

        Args:
            step: finished steps so far, which decides the learning rates.
            inputs, targets: [B, T], int64, this rank's; B a multiple of `micro_batches`.

        Raises:
            NonFiniteError: loss or gradients are NaN or infinite; the message names step and layer.
        """
        rates = self._optimizer.learning_rates(step, self._config.steps)
        self._optimizer.set_rates(rates)
        loss = torch.zeros((), device=self._device)
        num_parts = self._config.micro_batches
        for index, (part_inputs, part_targets) in enumerate(self._micro_batches(inputs, targets)):
            with nullcontext() if index + 1 == num_parts else self._spread.without_averaging():
                with autocast(self._device, self._config.precision):
                    part = token_loss(self._forward, part_inputs, part_targets) / num_parts
                part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        loss = self._world.total(loss) / self._world.world_size
        norms = self._optimizer.gradient_norms()
        measured = torch.stack([loss, norms["dense"].to(loss.device), norms["tables"].to(loss.device)]).tolist()
        if not all(map(_is_finite, measured)):
            self._optimizer.drop_gradients()
            raise NonFiniteError(self._explain(step, measured, inputs, targets))
        self._optimizer.step({"dense": measured[1], "tables": measured[2]})
        table_norm = None if self._optimizer.is_fused else measured[2]
        return StepResult(loss=measured[0], dense_grad_norm=measured[1], table_grad_norm=table_norm, rates=rates)

    def _micro_batches(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part in zip(
            inputs.chunk(self._config.micro_batches), targets.chunk(self._config.micro_batches), strict=True
        ):
            moved = [tensor.to(self._device, non_blocking=True) for tensor in part]
            yield moved[0], moved[1]

    def _explain(self, step: int, measured: list[float], inputs: Tensor, targets: Tensor) -> str:
        what = "loss" if not _is_finite(measured[0]) else "gradient norm"
        value = next(value for value in measured if not _is_finite(value))
        layer = None
        self._optimizer.set_rates({"dense": 0.0, "tables": 0.0})  # repeating the step must not train fused tables
        for part_inputs, part_targets in self._micro_batches(inputs, targets):
            with autocast(self._device, self._config.precision):
                loss_of = partial(token_loss, self._model, part_inputs, part_targets)
                layer = first_non_finite(self._model, loss_of, self._world.first_found)
            if layer:
                break
        kept = "of the tables, only rows with finite gradients were updated" if self._optimizer.is_fused else ""
        where = f"first in {layer}" if layer else "it did not happen again when the step was repeated"
        return (
            f"the {what} must stay finite; got {value} at step {step + 1}, {where}; {kept or 'nothing was updated'}: "
            "go on from the last checkpoint with a lower optimizer.tables.lr or optimizer.dense.lr"
        )


def _is_finite(value: float) -> bool:
    return value - value == 0.0

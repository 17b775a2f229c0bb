"""One optimiser step: micro-batches forward and backward, clipping, update.

A GPU is given the whole step before its loss is known, so that it never waits for the host: whether loss and gradients
are finite is decided there, and read by the host when the figures are.
"""

from collections.abc import Callable
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
from mfdist.table import Table
from mfdist.training.diagnosis import first_non_finite
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.step_graph import Parts, StepGraph, check_graph
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

    A step whose loss or gradients are not finite updates nothing, nor do those that were queued behind it, so the
    parameters stay those of the step before; but for fused tables, whose rows are left alone one by one where their own
    gradients are not finite.

    Raises:
        ConfigError: a CUDA graph is asked for where there can be none.
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
        loss_of: Any = partial(token_loss, self._spread.forward)
        # With the loss, or the logits would be written in fp32, and read again for each of its steps.
        self._loss_of: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss_of) if config.compile else loss_of
        self._optimizer = optimizer
        self._config = config
        self._device = device
        #: 1, or NaN from a step that is not finite until its figures are read: what each loss is multiplied by.
        self._soundness = torch.ones((), device=device)
        self._graph: StepGraph | None = None
        if config.cuda_graph:
            check_graph(device, self._world.world_size, _elsewhere(model))
            self._graph = StepGraph(model.parameters())

    @property
    def is_one_call(self) -> bool:
        """Return whether the passes are started as a graph by now; what is measured of them then is of the whole."""
        return self._graph is not None and self._graph.is_recorded

    def __call__(self, step: int, inputs: Tensor, targets: Tensor) -> StepResult:
        """Train on one batch and wait for its figures; see `queue` and `QueuedStep.result`."""
        return self.queue(step, inputs, targets).result()

    def queue(self, step: int, inputs: Tensor, targets: Tensor) -> "QueuedStep":
        """Train on one batch, of which each rank has an equal part, without waiting for the device.

        Args:
            step: finished and queued steps so far, which decides the learning rates.
            inputs, targets: [B, T], int64, this rank's; B a multiple of `micro_batches`.
        """
        began = _moment(self._device)
        rates = self._optimizer.learning_rates(step, self._config.steps)
        self._optimizer.set_rates(rates)
        parts = self._micro_batches(inputs, targets)
        loss = self._passes(parts) if self._graph is None else self._graph(self._passes, parts)
        loss = self._world.total(loss) / self._world.world_size
        norms = self._optimizer.gradient_norms()
        measured = torch.stack([loss, norms["dense"], norms["tables"]])
        is_sound = measured.isfinite().all()
        self._soundness.masked_fill_(~is_sound, torch.nan)
        self._optimizer.step(norms, is_sound)
        return QueuedStep(self._finished(step, rates, inputs, targets), measured, began)

    def _passes(self, parts: Parts) -> Tensor:
        """Return the loss over all micro-batches, whose gradients are left in the parameters."""
        loss = torch.zeros((), device=self._device)
        for index, (inputs, targets) in enumerate(parts):
            with nullcontext() if index + 1 == len(parts) else self._spread.without_averaging():
                with autocast(self._device, self._config.precision):
                    part = self._loss_of(inputs, targets) / len(parts)
                (part * self._soundness).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        return loss

    def _finished(
        self, step: int, rates: dict[str, float], inputs: Tensor, targets: Tensor
    ) -> Callable[[list[float]], StepResult]:
        """Return what makes a queued step's result of its loss and norms."""

        def finish(measured: list[float]) -> StepResult:
            if not all(map(_is_finite, measured)):
                try:
                    message = self._explain(step, measured, inputs, targets)
                finally:
                    self._soundness.fill_(1.0)
                raise NonFiniteError(message)
            table_norm = None if self._optimizer.is_fused else measured[2]
            return StepResult(loss=measured[0], dense_grad_norm=measured[1], table_grad_norm=table_norm, rates=rates)

        return finish

    def _micro_batches(self, inputs: Tensor, targets: Tensor) -> Parts:
        moved = (_pinned(tokens, self._device).to(self._device, non_blocking=True) for tokens in (inputs, targets))
        return list(zip(*(tokens.chunk(self._config.micro_batches) for tokens in moved), strict=True))

    def _explain(self, step: int, measured: list[float], inputs: Tensor, targets: Tensor) -> str:
        what = "loss" if not _is_finite(measured[0]) else "gradient norm"
        value = next(value for value in measured if not _is_finite(value))
        layer = None
        if self._graph is not None:  # whose memory the step that is repeated needs
            self._graph.forget()
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


class QueuedStep:
    """A step that the device has been given.

    Args:
        finish: makes the result of loss and norms.
        measured: those, on the device.
        began: recorded before the step's first kernel, where the device keeps time.
    """

    def __init__(self, finish: Callable[[list[float]], StepResult], measured: Tensor, began: Any) -> None:
        self._finish = finish
        self._measured = measured
        self._began = began
        if began is not None:
            # They go to the host by themselves, so that reading them waits for nothing that is queued later.
            self._measured = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
            self._measured.copy_(measured, non_blocking=True)
        self._done = _moment(measured.device)

    def result(self) -> StepResult:
        """Wait until the device has made the step, and return what it measured; to be called once, in order.

        Raises:
            NonFiniteError: loss or gradients are NaN or infinite; the message names step and layer. Steps queued after
                this one changed nothing and are to be forgotten.
        """
        if self._done is not None:
            self._done.synchronize()
        return self._finish(self._measured.tolist())

    def seconds_since(self, earlier: "QueuedStep | None") -> float | None:
        """Return how long the device took, once it has made the step; None if it keeps no time.

        Args:
            earlier: a step that was not done when this one was queued, and from whose end its time counts.
        """
        if self._done is None:
            return None
        start = self._began if earlier is None else earlier._done
        return float(start.elapsed_time(self._done)) / 1e3


def _moment(device: torch.device) -> Any:
    """Record where the device is in what it was given; None on a CPU."""
    if device.type != "cuda":
        return None
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _elsewhere(model: Transformer) -> str | None:
    tables = (module for module in model.modules() if isinstance(module, Table) and module.resident_rows is None)
    return next((f'table "{table.spec.name}"' for table in tables), None)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a batch from which a GPU copies while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def _is_finite(value: float) -> bool:
    return value - value == 0.0

"""Finding the layer in which a step first stopped being finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    agree: Callable[[str | None], str | None] = lambda found: found,
) -> str | None:
    """Repeat a forward and backward, and return where the first NaN or infinity appeared.

    Args:
        model: its modules are watched while `loss_of` runs; gradients left behind are dropped.
        loss_of: computes the step's loss with `model`.
        agree: given what this rank found so far, returns what all ranks take as found, so that they go on alike.

    Returns:
        Such as `blocks.2.ffn1 (output)`, `blocks.2.ffn1.table.weight (parameter)`, `head.weight (gradient)`; None when
        everything was finite this time.
    """
    bad = [name for name, parameter in model.named_parameters() if not _is_all_finite(parameter)]
    if where := agree(f"{bad[0]} (parameter)" if bad else None):
        return where
    found: list[str] = []
    handles = [module.register_forward_hook(_watch(name, found)) for name, module in model.named_modules() if name]
    try:
        loss = loss_of()
    finally:
        for handle in handles:
            handle.remove()
    if not found and not _is_all_finite(loss):
        found.append("the loss")
    if where := agree(f"{found[0]} (output)" if found else None):
        return where
    loss.backward()  # type: ignore[no-untyped-call]
    # Backward runs from the head down, so the last module in forward order whose gradient is bad saw it first.
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _is_all_finite(parameter.grad)
    ]
    model.zero_grad(set_to_none=True)
    return agree(f"{bad[-1]} (gradient)" if bad else None)


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not found and not _is_all_finite(output):
            found.append(name)

    return look


def _is_all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())

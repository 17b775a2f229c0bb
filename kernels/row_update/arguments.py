"""What the arguments of row updates must be, and how a rule travels through an operator's plain arguments."""

from typing import Any

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels.row_update.rule import Kind, RowRule


def rule_arguments(rule: RowRule) -> tuple[str, float, float, float, float, int]:
    """Return a rule as the operators take it."""
    return rule.kind, rule.weight_decay, rule.eps, *rule.betas, rule.seed


def check_update(table: Tensor, state: list[Tensor], rule: RowRule, lr: Tensor, step: Tensor, name: str) -> None:
    """Raise ConfigError unless a table, its state and a step's numbers fit together."""
    if table.ndim != 2 or not table.is_contiguous():
        raise ConfigError(
            f"a table that is updated in place must be contiguous [R, D]; got {list(table.shape)} with strides "
            f'{list(table.stride())} for table "{name}"'
        )
    shape = table.shape[:1] if rule.kind == "rowwise_adagrad" else table.shape
    kinds = [torch.float32] if rule.kind == "rowwise_adagrad" else [torch.float32, torch.bfloat16, torch.uint8]
    if table.dtype == torch.float64:
        kinds = [torch.float64]
    if len(state) != rule.num_states or not all(
        each.shape == shape and each.dtype in kinds and each.device == table.device and each.is_contiguous()
        for each in state
    ):
        raise ConfigError(
            f"{rule.kind} keeps {rule.num_states} states of shape {list(shape)} in {' or '.join(map(str, kinds))} "
            f'beside the rows; got {[(list(each.shape), each.dtype) for each in state]} for table "{name}"; '
            "make them anew after changing the table's dtype or device"
        )
    for number, kind, label in ((lr, torch.float32, "lr"), (step, torch.int64, "step")):
        if number.numel() != 1 or number.dtype != kind or number.device != table.device:
            raise ConfigError(
                f"{label} must be one {kind} number on {table.device}; got {list(number.shape)} in {number.dtype} on "
                f'{number.device} for table "{name}"'
            )


def check_given(table: Tensor, grads: Tensor, rows: Tensor | None, mean_squares: Tensor | None, name: str) -> None:
    """Raise ConfigError unless gradients that are there already fit the table; see `row_update`."""
    if rows is not None and (rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64)):
        raise ConfigError(
            f'rows to update must be [U] in int32 or int64; got {list(rows.shape)} in {rows.dtype} for table "{name}"'
        )
    num_updated = table.shape[0] if rows is None else rows.shape[0]
    if grads.ndim != 2 or grads.shape[1] != table.shape[1] or grads.shape[0] not in (num_updated, table.shape[0]):
        raise ConfigError(
            f"gradients must be [U, D] = [{num_updated}, {table.shape[1]}], or have all {table.shape[0]} rows; got "
            f'{list(grads.shape)} for table "{name}"'
        )
    if mean_squares is not None and (mean_squares.shape != (num_updated,) or mean_squares.dtype != torch.float32):
        raise ConfigError(
            f"mean_squares must be [U] = [{num_updated}] in fp32; got {list(mean_squares.shape)} in "
            f'{mean_squares.dtype} for table "{name}"'
        )
    if any(tensor is not None and tensor.device != table.device for tensor in (grads, rows, mean_squares)):
        raise ConfigError(f'gradients and rows must be on the table\'s device {table.device} for table "{name}"')


def read_settings(settings: tuple[Any, ...]) -> tuple[RowRule, tuple[int, int], tuple[Any, ...]]:
    """Return the rule, the offsets and what follows them from an operator's last arguments."""
    kind, weight_decay, eps, beta1, beta2, seed, row_offset, column_offset, *rest = settings
    name: Kind = kind
    rule = RowRule(kind=name, weight_decay=weight_decay, eps=eps, betas=(beta1, beta2), seed=seed)
    return rule, (row_offset, column_offset), tuple(rest)


def check_rows(rows: Tensor, num_rows: int, name: str) -> None:
    """Raise unless row numbers rise and lie in the table."""
    from mfdist.kernels.cpu_ids import checked_ids

    checked_ids(rows.unsqueeze(1), num_rows, name, is_code=False)
    if rows.numel() > 1 and not bool((rows[1:] > rows[:-1]).all()):
        place = int((rows[1:] <= rows[:-1]).nonzero()[0])
        raise ConfigError(
            f"rows to update must rise, each given once; got {int(rows[place + 1])} after {int(rows[place])} for table "
            f'"{name}"; sort them and add up the gradients of equal ones'
        )

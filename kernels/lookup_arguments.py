"""What a lookup's arguments must be, checked alike for the lookup and its gradient."""

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels.forward_mode import refuse_tangents

#: What rows may be; fp64 on the CPU alone, where the reference computes it.
ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_IDS = (torch.uint8, torch.uint16, torch.int32, torch.int64)


def check_lookup(
    table: Tensor,
    row_ids: Tensor,
    scores: Tensor,
    code_stride: int,
    name: str,
    *,
    row_dtypes: tuple[torch.dtype, ...] = ROW_DTYPES,
) -> None:
    """Raise ConfigError unless shapes, dtypes and devices fit together; the ids' values are the kernels' to check.

    A tangent of forward-mode differentiation is a NotImplementedError.
    """
    refuse_tangents("a lookup", table, scores)
    if table.ndim != 2 or row_ids.ndim != 2 or scores.shape != row_ids.shape:
        raise ConfigError(
            "a lookup takes a table [R, D], row_ids [N, K] and scores [N, K]; got "
            f'{_shape(table)}, {_shape(row_ids)} and {_shape(scores)} for table "{name}"'
        )
    if table.dtype not in row_dtypes or row_ids.dtype not in _IDS:
        raise ConfigError(
            f"a lookup takes rows in {_names(row_dtypes)} and ids in {_names(_IDS)}; got "
            f'{table.dtype} and {row_ids.dtype} for table "{name}"'
        )
    if scores.dtype == torch.float64 != table.dtype:
        raise ConfigError(
            "scores must be fp32, or fp64 where the rows are; got fp64, as activations in fp64 give them, and rows in "
            f'{table.dtype} for table "{name}"; cast one'
        )
    if scores.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f'scores must be fp32, as sign_hash gives them; got {scores.dtype} for table "{name}"')
    if not table.device == row_ids.device == scores.device:
        raise ConfigError(
            "a table, its row ids and scores must be on one device; got "
            f'{table.device}, {row_ids.device} and {scores.device} for table "{name}"'
        )
    if code_stride < 0 or (code_stride and table.shape[0] != row_ids.shape[1] * code_stride):
        raise ConfigError(
            "with a code_stride the table must have K · code_stride rows; got "
            f'{table.shape[0]} rows, K={row_ids.shape[1]}, code_stride={code_stride} for table "{name}"'
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_grad_output(table: Tensor, row_ids: Tensor, grad_output: Tensor, name: str) -> None:
    """Raise ConfigError unless a gradient has the shape and device of the lookup's output."""
    if grad_output.shape != (row_ids.shape[0], table.shape[1]) or grad_output.device != table.device:
        raise ConfigError(
            f"grad_output must be [N, D] = [{row_ids.shape[0]}, {table.shape[1]}] on {table.device}; got "
            f'{list(grad_output.shape)} on {grad_output.device} for table "{name}"'
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))

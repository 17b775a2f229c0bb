"""Rows of one byte a value, with a scale each. Letters: R rows, D row width."""

from typing import NamedTuple

import torch
from torch import Tensor

from mfdist.errors import ConfigError

#: What a value may be stored as → the largest that its row's largest value becomes.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: Rows are quantised a part at a time, so that a large table needs no fp32 copy of itself.
_PART_VALUES = 1 << 24
#: No scale is smaller, lest dividing by it overflow: values below it become 0.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class QuantizedRows(NamedTuple):
    """Rows of int8 or fp8 (e4m3): what value c of row r stands for is `values[r, c] · scales[r]`."""

    values: Tensor  # [R, D]
    scales: Tensor  # [R] fp32

    @property
    def as_bytes(self) -> Tensor:
        """Return the values as kernels take them, int8 as it is and e4m3 by its bits as uint8; the same memory."""
        return self.values if self.values.dtype == torch.int8 else self.values.view(torch.uint8)


@torch.no_grad()
def quantize(table: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """Return a table's rows in one byte a value.

    Args:
        table: [R, D], fp32, fp16 or bf16; R and D may be 0.
        dtype: torch.int8, or torch.float8_e4m3fn.

    Returns:
        New tensors on the table's device. The largest value of a row becomes 127 (int8) or 448 (fp8), the others in
        proportion, rounded to the nearest. With m the row's largest absolute value, none is off by more than m / 253
        as int8, or than a fifteenth of itself or m / 2^18, whichever is more, as fp8. A row with a value that is not
        finite becomes NaN altogether.

    Raises:
        ConfigError: the table is not [R, D], or a dtype is another.

    Cost: R·D elements read, as many bytes written; 128 MiB of scratch memory.
    """
    if table.ndim != 2 or table.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"a table to quantise must be [R, D] in fp32, fp16 or bf16; got {_told(table)}")
    if dtype not in LARGEST:
        raise ConfigError(f"rows are quantised to {' or '.join(map(str, LARGEST))}; got {dtype}")
    num_rows, dim = table.shape
    values = torch.empty(num_rows, dim, dtype=dtype, device=table.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=table.device)
    rows_together = max(1, _PART_VALUES // max(1, dim))
    for first in range(0, num_rows if dim else 0, rows_together):
        part = slice(first, first + rows_together)
        wide = table[part].float()
        largest = wide.abs().amax(1)
        # A GPU multiplies by the inverse of a number; two tensors it divides, as a CPU does, to the same bits.
        scale = (largest / torch.full_like(largest, LARGEST[dtype])).clamp_min(_SMALLEST_SCALE)
        scales[part] = scale.where(scale.isfinite(), torch.nan)
        wide = (wide / scales[part, None]).nan_to_num_(0.0)
        values[part] = wide.round_() if dtype == torch.int8 else wide
    return QuantizedRows(values, scales if dim else scales.zero_())


def dequantize(rows: QuantizedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rows [R, D] as floating-point values."""
    return (rows.values.to(torch.float64) * rows.scales.double()[:, None]).to(dtype)


def check_rows(rows: QuantizedRows, name: str) -> None:
    """Raise ConfigError unless values and scales are of one table."""
    values, scales = rows
    if values.ndim != 2 or values.dtype not in LARGEST or scales.dtype != torch.float32:
        raise ConfigError(
            "quantised rows are [R, D] in int8 or float8_e4m3fn, with scales [R] in fp32, as quantize gives them; got "
            f'{_told(values)} with {_told(scales)} for table "{name}"'
        )
    if scales.shape != values.shape[:1] or scales.device != values.device:
        raise ConfigError(
            f"quantised rows must have one scale each on their device; got {_told(values)} on {values.device} with "
            f'{_told(scales)} on {scales.device} for table "{name}"'
        )


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"

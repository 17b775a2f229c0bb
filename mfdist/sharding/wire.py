"""What rows and sums travel as: their own dtype, a narrower one, or fp8 with a scale a row. M rows, D values each."""

from dataclasses import dataclass

import torch
from torch import Tensor

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Wire:
    """How rows in `rows_dtype` travel where at most `dtype` is wanted; rows as narrow already stay as they are.

    In fp8 each row is scaled so that its largest value is the format's largest; its fp32 scale follows the values. A
    row with a value that is not finite arrives as NaN.
    """

    rows_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def payload_dtype(self) -> torch.dtype:
        """Return the dtype of what travels: bytes where it is fp8."""
        if self.dtype.itemsize >= self.rows_dtype.itemsize:
            return self.rows_dtype
        return torch.uint8 if self.dtype in _FP8 else self.dtype

    @property
    def num_scale_bytes(self) -> int:
        """Return the bytes that follow each row's values."""
        return _SCALE_BYTES if self.payload_dtype != self.rows_dtype and self.dtype in _FP8 else 0

    def width(self, row_dim: int) -> int:
        """Return how many elements of `payload_dtype` a row of D values takes."""
        return row_dim + self.num_scale_bytes

    def encode(self, rows: Tensor) -> Tensor:
        """Return rows [M, D] as they travel, [M, width(D)] and contiguous; `rows` itself where nothing changes."""
        if not self.num_scale_bytes:
            return rows.to(self.payload_dtype).contiguous()
        wide = rows.float()
        peak = wide.abs().amax(1, keepdim=True) if rows.shape[1] else wide.new_zeros(rows.shape[0], 1)
        scale = (peak / torch.finfo(self.dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale.where(scale.isfinite(), torch.nan).clone(memory_format=torch.contiguous_format)
        values = (wide / scale).to(self.dtype)
        return torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), dim=1)

    def write(self, rows: Tensor, out: Tensor) -> None:
        """Write rows [M, D] as they travel to `out`, [M, width(D)] of `payload_dtype`."""
        out.copy_(self.encode(rows) if self.num_scale_bytes else rows)

    def decode(self, payload: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows [M, D] in `dtype`, by default `rows_dtype`, from [M, width(D)] as it arrived."""
        dtype = dtype or self.rows_dtype
        if not self.num_scale_bytes:
            return payload.to(dtype)
        values, scale = payload[:, :-_SCALE_BYTES], payload[:, -_SCALE_BYTES:]
        scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (values.contiguous().view(self.dtype).float() * scale).to(dtype)

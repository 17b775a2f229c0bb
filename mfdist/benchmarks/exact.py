"""Results in float64, a part at a time, because all of a large case would fill any memory.

Letters: N tokens, K lookups a token, R rows, D row width, S code stride or 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mfdist.kernels.gather_sum.reference import global_ids

#: Values of fp64 that are held at a time.
_PART_VALUES = {"cuda": 1 << 27, "cpu": 1 << 23}


def sums(
    table: Tensor, row_ids: Tensor, scores: Tensor, code_stride: int, scales: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the tokens with their sums [n, D]."""
    ids = global_ids(row_ids, code_stride)
    for tokens in _parts(row_ids.shape[0], row_ids.shape[1] * table.shape[1], table.device):
        weights = scores[tokens].double()
        if scales is not None:
            weights = weights * scales[ids[tokens]].double()
        yield tokens, (weights.unsqueeze(1) @ _rows(table, ids[tokens])).squeeze(1)


def score_gradients(
    table: Tensor, row_ids: Tensor, grad_output: Tensor, code_stride: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the tokens with the gradients [n, K] of their scores."""
    ids = global_ids(row_ids, code_stride)
    for tokens in _parts(row_ids.shape[0], row_ids.shape[1] * table.shape[1], table.device):
        yield tokens, (_rows(table, ids[tokens]) @ grad_output[tokens].double().unsqueeze(2)).squeeze(2)


def row_gradients(
    num_rows: int, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows with their gradients [r, D]; without a code stride those of all rows are held."""
    dim = grad_output.shape[1]
    grads = grad_output.double()
    num_lookups = row_ids.shape[1]
    lookup_groups = [slice(0, num_lookups)]
    if code_stride:
        lookup_groups = list(_parts(num_lookups, code_stride * dim, row_ids.device))
    for lookups in lookup_groups:
        rows = slice(lookups.start * code_stride, lookups.stop * code_stride) if code_stride else slice(0, num_rows)
        total = torch.zeros(rows.stop - rows.start, dim, dtype=torch.float64, device=row_ids.device)
        for k in range(lookups.start, lookups.stop):
            ids = row_ids[:, k].long() + (k - lookups.start) * code_stride
            total.index_add_(0, ids, grads * scores[:, k, None].double())
        for part in _parts(total.shape[0], dim, row_ids.device):
            yield slice(rows.start + part.start, rows.start + part.stop), total[part]


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    """Return rows in fp64; what has one byte a value is gathered as bytes, because torch gathers no fp8 everywhere."""
    if table.itemsize > 1:
        return table[ids].double()
    return table.view(torch.uint8)[ids].view(table.dtype).to(torch.float64)


def _parts(count: int, values_each: int, device: torch.device) -> Iterator[slice]:
    together = max(1, _PART_VALUES[device.type] // max(1, values_each))
    for first in range(0, count, together):
        yield slice(first, min(count, first + together))

"""row_products on the CPU: a row after another, each in one sum of as many lanes on every processor.

What takes the time is reading: rows are fetched a page ahead, where the processor's own prefetching stops.
"""

from typing import Any

import numba
import torch
from torch import Tensor

from mfdist.kernels.cpu_rows import flat, flat_rows
from mfdist.kernels.cpu_threads import call, jit, jit_part, num_threads
from mfdist.kernels.lanes import NARROW, load, prefetch, product_add, total, zeros_narrow, zeros_single

#: Elements between the one that is read and the one that is fetched: 4 KiB in fp32.
_AHEAD = 1024
#: Elements of work that repay waking the threads.
_PARALLEL_WORK = 1 << 20


def row_products(rows: Tensor, x: Tensor) -> Tensor:
    """Return [R] in the rows' dtype; see `mfdist.kernels.row_products`."""
    num_rows, dim = rows.shape
    out = torch.empty(num_rows)
    threads = num_threads(rows.numel(), worth=_PARALLEL_WORK)
    arguments = (flat_rows(rows), flat(x.float()), flat(out), num_rows, dim)
    if threads == 1:
        _products(*arguments)
    else:
        call(_products_in_parts, threads, *arguments, threads)
    return out.to(rows.dtype)


@jit()
def _products(rows: Any, x: Any, out: Any, R: Any, D: Any) -> None:
    _part(rows, x, out, D, 0, R)


@jit(parallel=True)
def _products_in_parts(rows: Any, x: Any, out: Any, R: Any, D: Any, parts: Any) -> None:
    each = -(-R // parts)
    for part in numba.prange(parts):
        _part(rows, x, out, D, min(R, part * each), min(R, part * each + each))


@jit_part()
def _part(rows: Any, x: Any, out: Any, D: Any, low: Any, high: Any) -> None:
    lanes, single = zeros_narrow(), zeros_single()
    whole = D // NARROW * NARROW
    last = max(high * D - NARROW, 0)
    for r in range(low, high):
        start = r * D
        run = zeros_narrow()
        for i in range(0, whole, NARROW):
            prefetch(rows, min(start + i + _AHEAD, last), lanes)
            run = product_add(load(rows, start + i, lanes), load(x, i, lanes), run)
        rest = zeros_single()
        for i in range(whole, D):
            rest = product_add(load(rows, start + i, single), load(x, i, single), rest)
        out[r] = total(run) + total(rest)

"""How large a table one device trains, and whether its rows come as fast as a small table's.

Rows are bf16, trained by row-wise Adagrad in backward: two bytes a weight and four a row, and nothing of the table's
size beside it. Ids are random rows of the whole table.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist import quantities
from mfdist.benchmarks.timing import quartile_spread
from mfdist.optim import RowAdagrad
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.training.device import is_out_of_memory, synchronize

_LR = 0.1
#: Of a bf16 weight that was rounded up or down, and of fp32 sums.
_TOLERANCE = 2.0**-7
_CHECKED_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class SizeSpeed:
    """What one table did.

    Args:
        num_rows, row_dim: of the table.
        table_bytes: of its rows.
        forward_s, step_s: medians of a lookup, and of a lookup with backward and update.
        step_spread: how far apart the quartiles of steps' times are, a share of the median; NaN for a single step.
        forward_bytes_per_s: rows read, each as often as it is looked up.
        step_bytes_per_s: those; output gradients read once a lookup; and each row that is looked up, read and written.
        peak_bytes: the most GPU memory at a time; None on a CPU.
        error: the largest ‖got − expected‖ / ‖expected‖ of a few sums, and of rows after the first update.
    """

    num_rows: int
    row_dim: int
    table_bytes: int
    forward_s: float
    step_s: float
    step_spread: float
    forward_bytes_per_s: float
    step_bytes_per_s: float
    peak_bytes: int | None
    error: float

    @property
    def is_wrong(self) -> bool:
        """Return whether sums or rows were not those expected; NaN is not."""
        return not self.error <= _TOLERANCE


def measure_sizes(
    sizes: Sequence[int],
    device: torch.device,
    *,
    row_dim: int = 1024,
    num_tokens: int = 16384,
    num_lookups: int = 128,
    turns: int = 20,
) -> Iterator[SizeSpeed]:
    """Yield what a table of each size does; the one before is gone by then.

    Args:
        sizes: bytes of rows.
        device: that holds the table.
        row_dim: of it.
        num_tokens, num_lookups: of a step.
        turns: that are timed.

    Raises:
        MemoryError: a table does not fit; those before were yielded.
    """
    for size in sizes:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        spec = TableSpec(name="sized", num_rows=size // (2 * row_dim), row_dim=row_dim, dtype=torch.bfloat16)
        try:
            speed = _measured(
                LocalTable(spec, device=device, fuse=RowAdagrad(lr=_LR)), device, num_tokens, num_lookups, turns
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(f"{quantities.num_bytes(size)} with what a step needs do not") from error
        yield speed


def _measured(table: LocalTable, device: torch.device, num_tokens: int, num_lookups: int, turns: int) -> SizeSpeed:
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_tokens, num_lookups)
    spec = table.spec
    ids = torch.randint(spec.num_rows, shape, device=device, generator=generator)
    scores = torch.rand(shape, device=device, generator=generator).requires_grad_()
    grad = torch.randn(num_tokens, spec.row_dim, device=device, generator=generator).to(torch.bfloat16)

    def forward() -> None:
        with torch.no_grad():
            table(ids, scores)

    def step() -> None:
        table(ids, scores).backward(grad)

    error = _error(table, ids, scores, grad)
    forward_s = statistics.median(_taken_s(forward, device, turns))
    steps_s = _taken_s(step, device, turns)
    step_s = statistics.median(steps_s)
    read = ids.numel() * spec.row_dim * 2
    touched = int(torch.unique(ids).numel()) * spec.row_dim * 2
    return SizeSpeed(
        num_rows=spec.num_rows,
        row_dim=spec.row_dim,
        table_bytes=table.weight.nbytes,
        forward_s=forward_s,
        step_s=step_s,
        step_spread=quartile_spread(steps_s),
        forward_bytes_per_s=read / forward_s,
        step_bytes_per_s=(2 * read + 2 * touched) / step_s,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        error=error,
    )


def _error(table: LocalTable, ids: Tensor, scores: Tensor, grad: Tensor) -> float:
    """Return how far a few sums, and a few rows after one step, are from float64's."""
    sums = table(ids, scores)
    few = slice(0, _CHECKED_ROWS)
    expected = (table.weight.detach()[ids[few]].double() * scores.detach()[few, :, None]).sum(1)
    errors = [_distance(sums.detach()[few], expected)]
    rows: Tensor = torch.unique(ids[-1, few])
    before = table.weight.detach()[rows].double()
    sums.backward(grad)
    for row, old in zip(rows, before, strict=True):
        tokens, lookups = (ids == row).nonzero(as_tuple=True)
        gradient = (grad[tokens].double() * scores.detach()[tokens, lookups, None]).sum(0)
        new = old - _LR * gradient / gradient.square().mean().sqrt()
        errors.append(_distance(table.weight.detach()[row], new))
    return max(errors)


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def _taken_s(work: Callable[[], None], device: torch.device, turns: int) -> list[float]:
    taken = []
    for _ in range(turns + 1):  # the first compiles
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return taken[1:]

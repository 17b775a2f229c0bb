"""Cuts: where a table's rows or columns are divided. Pure integer arithmetic.

Cuts are an ascending tuple (0, …, size); part i is [cuts[i], cuts[i+1]). Two equal neighbours make an empty part, so a
split over more owners than there are rows is nothing special. Adjacent parts share their border by construction, which
is why a plan cannot hold a hole or an overlap once its cuts ascend.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mfdist.errors import ConfigError

Cuts = tuple[int, ...]


@lru_cache(maxsize=4096)
def even_cuts(size: int, num_parts: int, step: int = 1) -> Cuts:
    """Return the cuts of `size` into parts whose sizes differ by at most `step`, every cut a multiple of `step`.

    Args:
        size: what is divided, a multiple of `step`.
        num_parts: at least 1.
        step: the smallest piece that is not divided, such as the rows of a slot.
    """
    num_pieces = size // step
    if num_pieces * num_parts < 1 << 62:
        return tuple((np.arange(num_parts + 1) * num_pieces // num_parts * step).tolist())
    return tuple(num_pieces * part // num_parts * step for part in range(num_parts + 1))


@lru_cache(maxsize=64)
def first_ranks(num_ranks: int) -> tuple[int, ...]:
    """Return 0, 1, …: one tuple for all the tables that are split over the same ranks."""
    return tuple(range(num_ranks))


def levelling_cuts(size: int, loads: npt.NDArray[np.float64], step: int = 1) -> Cuts:
    """Return even cuts whose larger parts go to those who carry least so far.

    Cutting one table after another so keeps the loads within one piece of each other, the largest of any table.

    Args:
        size: what is divided, a multiple of `step`.
        loads: [parts] what each part's owner carries already; at least one.
        step: the smallest piece that is not divided.
    """
    base, num_left = divmod(size // step, len(loads))
    if not num_left:
        return even_cuts(size, len(loads), step)
    pieces = np.full(len(loads), base)
    pieces[np.argsort(loads, kind="stable")[:num_left]] += 1
    return (0, *(np.cumsum(pieces) * step).tolist())


def check_cuts(cuts: Cuts, size: int, what: str, where: str, step: int = 1) -> None:
    """Raise ConfigError unless `cuts` ascend from 0 to `size` in multiples of `step`.

    Args:
        cuts: the cuts to check.
        size: number of rows or columns.
        what: "rows" or "columns".
        where: the table, as messages name it.
        step: what every cut must be a multiple of.
    """
    if len(cuts) < 2:
        raise ConfigError(f"{what} must be cut into at least one part; got cuts {list(cuts)} of {where}")
    if cuts[0] != 0:
        raise ConfigError(f"{what} must be cut from 0; in {where} {what} {_span(0, cuts[0])} have no owner")
    if list(cuts) != sorted(cuts):
        left, right = next((left, right) for left, right in pairwise(cuts) if left > right)
        raise ConfigError(f"cuts must ascend; in {where} {what} {_span(right, left)} have two owners")
    if cuts[-1] != size:
        span, problem = (
            (_span(cuts[-1], size), "have no owner") if cuts[-1] < size else (_span(size, cuts[-1]), "do not exist")
        )
        raise ConfigError(f"{what} must be cut up to {size}; in {where} {what} {span} {problem}")
    if step > 1 and any(cut % step for cut in cuts):
        cut = next(cut for cut in cuts if cut % step)
        raise ConfigError(
            f"{what} must be cut between slots of code_stride={step}; got {cut} in {where}; "
            f"nearest that fit: {cut // step * step} and {cut // step * step + step}"
        )


def _span(begin: int, end: int) -> str:
    return f"[{begin}, {end})"

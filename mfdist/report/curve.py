"""Curves that are small enough to draw: the mean of each stretch, and the least and the largest in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: Points of a curve at most; more than that no screen shows apart.
MAX_POINTS = 400

Floats = npt.NDArray[np.float64]


def thinned(
    places: Mapping[str, Sequence[float]],
    curves: Mapping[str, Sequence[float | None]],
    max_points: int = MAX_POINTS,
) -> dict[str, Any]:
    """Return curves over common places, in at most `max_points` stretches of equal length, as JSON values.

    Args:
        places: axes by name, each with the place of every value, ascending; of a stretch its last place is kept.
        curves: values by name, as many as places; None, NaN and infinity count as nothing.
        max_points: of each curve.

    Returns:
        `places`, and `curves`: name → `mean`, and `low` and `high` where stretches are longer than one; null where
        there is nothing.
    """
    length = len(next(iter(places.values())))
    number = min(length, max_points)
    edges = np.arange(number + 1, dtype=np.int64) * length // max(1, number)
    last = edges[1:] - 1
    along = {name: _short(np.asarray(values, dtype=np.float64)[last], 6) for name, values in places.items()}
    return {"places": along, "curves": {name: _curve(values, edges) for name, values in curves.items()}}


def _curve(values: Sequence[float | None], edges: npt.NDArray[np.int64]) -> dict[str, Any]:
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if not len(numbers):
        return {"mean": []}
    is_known, starts = np.isfinite(numbers), edges[:-1]
    counts = np.add.reduceat(is_known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(is_known, numbers, 0.0), starts)
    curve = {"mean": _short(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))}
    if np.diff(edges).max() > 1:
        for name, end, reduce in (("low", np.inf, np.minimum), ("high", -np.inf, np.maximum)):
            found = reduce.reduceat(np.where(is_known, numbers, end), starts)
            curve[name] = _short(np.where(counts > 0, found, np.nan))
    return curve


def _short(values: Floats, digits: int = 5) -> list[float | int | None]:
    """Return numbers of a few significant digits, whole ones without a point, and None for NaN."""
    short: list[float | int | None] = []
    for value in values.tolist():
        if value != value:
            short.append(None)
            continue
        rounded = float(f"{value:.{digits}g}") if abs(value) < 10**digits else round(value)
        short.append(int(rounded) if float(rounded).is_integer() else rounded)
    return short

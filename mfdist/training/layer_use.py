"""How evenly a memory layer's tokens spread over its rows: figures and curves from counted codes. Pure.

Every figure stands beside what codes drawn evenly would give at as many tokens, because few tokens leave rows untouched
however well they hash. Shape letters: N tokens, K tables, S = 2^bits rows of a table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.training.code_census import BUCKETS_AN_OCTAVE, LOWEST_OCTAVE, Counts, LayerCounts
from mfdist.training.row_movement import LayerMovement

Floats = npt.NDArray[np.float64]

#: The quantiles of scores and movements.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: A map of hits has at most so many lines, of neighbouring tables, and columns, of rows that are hit alike.
MAP_TABLES, MAP_COLUMNS = 64, 48
LORENZ_POINTS = 51
NUM_HOT_ROWS = 10
#: A bit that carries less than this is taken to be constant; 1 % of one sign carries 0.08.
CONSTANT_BIT = 0.02
#: A layer whose codes carry less than this share of what they could has collapsed.
COLLAPSED = 0.2


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How a layer's rows are used, in a few numbers.

    Args:
        name: of its table.
        num_tables: K.
        bits: of a code.
        code_entropy: bits that a code carries, the mean over tables.
        least_code_entropy: of the table whose codes carry least.
        even_code_entropy: what codes drawn evenly carry at as many tokens.
        constant_bits: share of the K·bits bits that are the same for nearly every token.
        dead_share: share of the rows that no token addressed.
        even_dead_share: what codes drawn evenly leave.
        hottest_share: the largest share of a table's lookups that one row takes.
        scores: at QUANTILES.
        movement: distance to a row's first values as a multiple of their norm, at QUANTILES; None where it is unknown.
        unmoved_share: share of the rows that are as they were drawn; None where it is unknown.
    """

    name: str
    num_tables: int
    bits: int
    code_entropy: float
    least_code_entropy: float
    even_code_entropy: float
    constant_bits: float
    dead_share: float
    even_dead_share: float
    hottest_share: float
    scores: tuple[float, ...]
    movement: tuple[float, ...] | None
    unmoved_share: float | None

    @property
    def evenness(self) -> float:
        """Return the bits that codes carry as a share of what they could: 1 is even, 0 is one row for all."""
        return self.code_entropy / self.even_code_entropy if self.even_code_entropy else 1.0

    @property
    def has_collapsed(self) -> bool:
        """Return whether the layer hashes hardly any token apart from the others."""
        return self.evenness < COLLAPSED


def use_of(counts: LayerCounts, movement: LayerMovement | None = None) -> LayerUse:
    """Return the figures of a layer of which at least one token was counted."""
    entropy = code_entropy(counts.hits)
    moved = None if movement is None else movement.moved
    return LayerUse(
        name=counts.name,
        num_tables=counts.num_tables,
        bits=counts.bits,
        code_entropy=float(entropy.mean()),
        least_code_entropy=float(entropy.min()),
        even_code_entropy=even_code_entropy(counts.num_tokens, counts.hits.shape[1]),
        constant_bits=float((binary_entropy(bit_shares(counts.hits)) < CONSTANT_BIT).mean()),
        dead_share=float((counts.hits == 0).mean()),
        even_dead_share=math.exp(-counts.num_tokens / counts.hits.shape[1]),
        hottest_share=float(counts.hits.max()) / counts.num_tokens,
        scores=tuple(score_quantiles(counts.scores)),
        movement=None if moved is None else tuple(np.quantile(moved, QUANTILES).tolist()),
        unmoved_share=None if moved is None else float((moved == 0).mean()),
    )


def detail_of(counts: LayerCounts, movement: LayerMovement | None = None) -> dict[str, Any]:
    """Return what a report draws of a layer, as small JSON values; docs/reference/metrics.md names the keys."""
    num_tokens, num_rows = counts.num_tokens, counts.hits.shape[1]
    hottest = np.argsort(counts.hits, axis=None, kind="stable")[::-1][:NUM_HOT_ROWS]
    tables, codes = np.unravel_index(hottest, counts.hits.shape)
    lines = _lines(len(counts.tables))
    entropy, dead = code_entropy(counts.hits), (counts.hits == 0).mean(1)
    return {
        "name": counts.name,
        "num_tables": counts.num_tables,
        "bits": counts.bits,
        "tables": [counts.tables[begin] for begin, _ in lines],
        "code_entropy": _rounded(_mean(entropy, lines)),
        "dead_share": _rounded(_mean(dead, lines)),
        "hits": _rounded(hit_map(counts.hits, lines) * (num_rows / num_tokens)),
        "bit_shares": _rounded(_mean(bit_shares(counts.hits), lines)),
        "lorenz": _rounded(lorenz(counts.hits)),
        "even_lorenz": _rounded(even_lorenz(num_tokens, num_rows)),
        "hot_rows": [
            {"table": counts.tables[table], "code": int(code), "share": int(counts.hits[table, code]) / num_tokens}
            for table, code in zip(tables, codes, strict=True)
        ],
        "scores": _octaves(counts.scores),
        "movement": None if movement is None else _movement(counts, movement),
    }


def code_entropy(hits: Counts) -> Floats:
    """Return the bits [K] that each table's codes carry, of hits [K, S]."""
    shares = hits / np.maximum(hits.sum(1, keepdims=True), 1)
    return np.asarray(-(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(1) + 0.0)


@lru_cache(maxsize=64)
def even_code_entropy(num_tokens: int, num_rows: int) -> float:
    """Return the bits that `num_tokens` codes drawn evenly from `num_rows` carry, on average."""
    hits, chances = _poisson(num_tokens / num_rows)
    spread = num_rows * float((chances * hits * np.log2(np.maximum(hits, 1))).sum())
    return max(0.0, math.log2(num_tokens) - spread / num_tokens)


def bit_shares(hits: Counts) -> Floats:
    """Return the share [K, bits] of codes in which each bit is set, of hits [K, S]; the highest bit first."""
    num_rows = hits.shape[1]
    bits = num_rows.bit_length() - 1
    is_set = (np.arange(num_rows)[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.asarray(hits @ is_set / np.maximum(hits.sum(1, keepdims=True), 1))


def binary_entropy(shares: Floats) -> Floats:
    """Return the bits that something carries which is so in a share of the cases."""
    both = np.stack([shares, 1 - shares])
    return np.asarray(-(both * np.log2(np.where(both > 0, both, 1.0))).sum(0))


def lorenz(hits: Counts) -> Floats:
    """Return the share [LORENZ_POINTS] of the lookups that the least hit 0 to 100 % of the rows take."""
    ascending = np.concatenate([[0], np.cumsum(np.sort(hits, axis=None))])
    places = np.linspace(0, len(ascending) - 1, LORENZ_POINTS)
    return np.asarray(np.interp(places, np.arange(len(ascending)), ascending / max(1, ascending[-1])))


def even_lorenz(num_tokens: int, num_rows: int) -> Floats:
    """Return the same of codes drawn evenly: the diagonal, but for chance."""
    mean = num_tokens / num_rows
    hits, chances = _poisson(mean)
    rows = np.concatenate([[0.0], np.cumsum(chances)])
    lookups = np.concatenate([[0.0], np.cumsum(chances * hits / mean)])
    return np.asarray(np.interp(np.linspace(0, 1, LORENZ_POINTS), rows / rows[-1], lookups / lookups[-1]))


def hit_map(hits: Counts, lines: Sequence[tuple[int, int]]) -> Floats:
    """Return the mean hits [lines, columns] of rows of neighbouring tables, each table's from most to least hit."""
    descending = -np.sort(-hits, axis=1)
    num_columns = min(MAP_COLUMNS, hits.shape[1])
    edges = np.arange(num_columns) * hits.shape[1] // num_columns
    widths = np.diff(np.append(edges, hits.shape[1]))
    return _mean(np.add.reduceat(descending, edges, axis=1) / widths, lines)


def score_quantiles(scores: Counts) -> list[float]:
    """Return the scores at QUANTILES, of counts by bucket: within 2 %."""
    total = np.concatenate([[0], np.cumsum(scores)])
    places = np.interp(np.array(QUANTILES) * total[-1], total, np.arange(len(total)))
    return [float(2 ** (LOWEST_OCTAVE + place / BUCKETS_AN_OCTAVE)) for place in places]


def _octaves(scores: Counts) -> dict[str, Any]:
    """Return the shares of scores in quarters of an octave, from the lowest that has any to the highest."""
    quarters = scores.reshape(-1, BUCKETS_AN_OCTAVE // 4).sum(1) / max(1, scores.sum())
    used = np.flatnonzero(quarters)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    return {"first_octave": LOWEST_OCTAVE + first / 4, "shares": _rounded(quarters[first : last + 1])}


def _movement(counts: LayerCounts, movement: LayerMovement) -> dict[str, Any]:
    """Return the mean movement of the sampled rows of each table that has any."""
    of_rows = movement.row_ids // counts.hits.shape[1]
    tables = np.unique(of_rows)
    means = np.array([movement.moved[of_rows == table].mean() for table in tables])
    return {"tables": tables.tolist(), "moved": _rounded(means)}


def _lines(num_tables: int) -> list[tuple[int, int]]:
    """Return [begin, end) of the tables that share a line of a map."""
    num_lines = min(num_tables, MAP_TABLES)
    edges = [index * num_tables // num_lines for index in range(num_lines + 1)]
    return list(pairwise(edges))


def _mean(values: Floats, lines: Sequence[tuple[int, int]]) -> Floats:
    return np.stack([values[begin:end].mean(0) for begin, end in lines])


@lru_cache(maxsize=64)
def _poisson(mean: float) -> tuple[Floats, Floats]:
    """Return hits from 0 up and the chance of each, for rows that are hit `mean` times on average by chance."""
    hits = np.arange(int(mean + 12 * math.sqrt(mean)) + 20, dtype=np.float64)
    logs = np.concatenate([[0.0], np.cumsum(np.log(hits[1:]))])
    return hits, np.exp(hits * math.log(mean) - mean - logs)


def _rounded(values: Floats) -> Any:
    """Return nested lists of numbers of three significant digits."""
    magnitude = 10.0 ** (np.floor(np.log10(np.where(values == 0, 1, np.abs(values)))) - 2)
    return np.round(np.round(values / magnitude) * magnitude, 12).tolist()

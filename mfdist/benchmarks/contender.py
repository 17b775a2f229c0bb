"""What is measured: contenders that do the same work, and what was found of each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mfdist.benchmarks.timing import Work
from mfdist.testing.tolerances import TOLERANCES

Outputs = tuple[Tensor, ...]


class Distance:
    """How far a result lies from float64, added up a part at a time: ‖got − expected‖ / ‖expected‖."""

    def __init__(self, dtype: object, parts: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """Start with `parts`, pairs of got and expected; `dtype` is the result's and sets its tolerance."""
        self.tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
        self._missed = self._size = 0.0
        for got, expected in parts:
            self.add(got, expected)

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Add a part; a shape that differs, or a NaN that only one of them has, makes the whole NaN."""
        if got.shape != expected.shape:
            self._missed = float("nan")
            return
        self._missed += float((got.double() - expected).square().sum())
        self._size += float(expected.double().square().sum())

    @property
    def relative(self) -> float:
        """Return the distance relative to the expected result, or as it is where that is zero."""
        return float((self._missed / self._size if self._size else self._missed) ** 0.5)

    @property
    def is_close(self) -> bool:
        """Return whether it is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation of some work, its inputs made."""

    work: Work
    #: The result of one call, and its distances from float64, one for each output.
    outputs: Callable[[], Outputs]
    distances: Callable[[Outputs], list[Distance]]
    #: What a rate counts: bytes the work would move if no cache held any.
    num_bytes: int
    #: Whether it promises the same bits every time.
    repeats: bool = False
    #: Forward and backward, whose memory beyond inputs and outputs is to be measured.
    step: Callable[[], Outputs] | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Contenders for one operation on one case; a contender is made when its turn comes."""

    op: str
    case: str
    ceiling: Literal["copy", "read"]
    #: Whether it is timed as inference is run, without what keeps gradients possible.
    is_inference: bool = False
    contenders: Mapping[str, Callable[[], Contender]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found of one contender; a time that is None was not taken, and `note` or `error` says why."""

    op: str
    case: str
    impl: str
    median_us: float | None = None
    #: How far apart the quartiles of the calls' times are, as a share of the median.
    spread: float | None = None
    bytes_per_s: float | None = None
    share_of_ceiling: float | None = None
    #: ‖got − expected‖ / ‖expected‖ of the output that is furthest from its tolerance.
    error: float | None = None
    tolerance: float | None = None
    #: Calls, after the first, that were compared with it and gave the same bits.
    repeats: int = 0
    #: Memory that forward and backward took beyond inputs and outputs, at most.
    extra_bytes: int | None = None
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Return whether the contender's result was not the expected one, so that it was not timed."""
        is_close = self.error is None or self.tolerance is None or self.error <= self.tolerance
        return not is_close or self.note == DIFFERS


#: The note of a contender that should repeat bit for bit and did not.
DIFFERS = "gave other bits in a repetition"

"""How far results may lie from a float64 oracle: one table for all machines, implementations and tests.

The measure is ‖got − expected‖ / ‖expected‖ over the whole result. Each bound is a few times what correct code shows:
rounding to the result's dtype, plus fp32 sums of a few hundred terms.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

#: dtype of the result → largest relative error.
TOLERANCES: Final[dict[str, float]] = {
    "float64": 1e-12,
    "float32": 2e-6,
    "float16": 1e-3,
    "bfloat16": 8e-3,
}


def relative_error(got: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Return ‖got − expected‖ / ‖expected‖ in float64: 0 for two empty or zero arrays, NaN if `got` has a NaN alone.

    Raises:
        ValueError: the shapes differ.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise ValueError(f"shapes must be equal; got {got.shape} and {expected.shape}")
    distance, size = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
    return distance / size if size else distance

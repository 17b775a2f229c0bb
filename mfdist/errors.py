"""The errors mfdist raises, grouped by what a caller would do about them.

Every message is one line: what must hold; got what, where; what to do. Each class is also the builtin exception it
refines, so `except ValueError` keeps working, carries a stable `kind` for programs, and survives pickling.
"""

from typing import ClassVar


class MfdistError(Exception):
    """Base of every error raised on purpose by mfdist."""

    kind: ClassVar[str] = "internal"


class ConfigError(MfdistError, ValueError):
    """What was asked for is wrong; correct it and ask again. No run, row or checkpoint that was there was changed."""

    kind: ClassVar[str] = "config"


class RowIdError(ConfigError, IndexError):
    """A row id lies outside its table. Nothing was read or written."""

    kind: ClassVar[str] = "row_id"


class DataError(ConfigError):
    """Training text is missing, unreadable, or not text."""

    kind: ClassVar[str] = "data"


class UnavailableError(MfdistError, ConnectionError):
    """Something outside this process does not answer or is busy; trying again later may work."""

    kind: ClassVar[str] = "unavailable"


class NotPrimaryError(UnavailableError):
    """A server may not do this, because the other one of its pair has taken over, or could. Ask that one."""

    kind: ClassVar[str] = "not_primary"


class ConsistencyError(MfdistError, RuntimeError):
    """Two parts that must agree do not; going on would compute something else."""

    kind: ClassVar[str] = "consistency"


class NonFiniteError(ConsistencyError, ArithmeticError):
    """Training produced NaN or infinity; the parameters are those before the failing step."""

    kind: ClassVar[str] = "non_finite"


class CheckpointError(MfdistError, OSError):
    """A checkpoint cannot be written or read; earlier committed steps are untouched."""

    kind: ClassVar[str] = "checkpoint"


class InternalError(MfdistError, AssertionError):
    """A defect in mfdist; please report it with the traceback."""

    kind: ClassVar[str] = "internal"


#: kind → (exit code of the command line, name of the gRPC status). A test keeps it complete.
OUTCOMES: dict[str, tuple[int, str]] = {
    "config": (2, "INVALID_ARGUMENT"),
    "row_id": (2, "OUT_OF_RANGE"),
    "data": (2, "FAILED_PRECONDITION"),
    "unavailable": (1, "UNAVAILABLE"),
    "not_primary": (1, "UNAVAILABLE"),
    "consistency": (1, "ABORTED"),
    "non_finite": (1, "ABORTED"),
    "checkpoint": (1, "DATA_LOSS"),
    "internal": (1, "INTERNAL"),
}

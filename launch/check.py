"""One check of a machine: what it found, and what to do where it failed."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""  # empty where all is well
    is_essential: bool = True  # without it nothing trains; else something is lost or slower


class CheckFailed(Exception):
    """A check found what it looks for; carries what to say instead of a traceback."""


def attempt(name: str, check: Callable[[], str], remedy: str, *, is_essential: bool = True) -> Check:
    """Do one check.

    Args:
        name: of the check, as people read it.
        check: does a small piece of the work for real and returns what it found; whatever it raises is a failure.
        remedy: what to do then.
        is_essential: whether nothing trains without it.
    """
    try:
        return Check(name=name, ok=True, detail=check(), is_essential=is_essential)
    except CheckFailed as failure:
        detail = str(failure)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding, and the other checks still matter
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Check(name=name, ok=False, detail=detail, remedy=remedy, is_essential=is_essential)

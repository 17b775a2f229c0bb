"""Quantities as people read them: counts, bytes, durations, shares, and text that a terminal can safely show."""

import math
import re

from mfdist.errors import ConfigError

_COUNT_SUFFIXES = ("", "k", "M", "B", "T")
_BYTE_SUFFIXES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(value: float) -> str:
    """Return a count in at most three digits and a suffix: 950, 8.1k, 12.4M, 1.9B."""
    return _scaled(value, 1000.0, _COUNT_SUFFIXES, "")


def num_bytes(value: float) -> str:
    """Return a size in binary units: 512 B, 1.2 GiB."""
    return _scaled(value, 1024.0, _BYTE_SUFFIXES, " ")


def parse_bytes(text: str) -> int:
    """Return the bytes that a person wrote: `80GB`, `79.6GiB`, `1 TB`, `512`; GB is 10⁹, GiB is 2³⁰.

    Raises:
        ConfigError: it is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kMGTP])(i?))?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f'a size must be a number with a unit, such as 80GB or 64GiB; got "{text}"')
    number, prefix, binary = match.groups()
    value = int(float(number) * (1024 if binary else 1000) ** (" kmgtp".index(prefix.lower()) if prefix else 0))
    if value < 1:
        raise ConfigError(f'a size must be at least one byte; got "{text}"')
    return value


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 0.4s, 42s, 1m40s, 3h05m, 2d04h; "?" where it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def share(value: float) -> str:
    """Return a share of one in per cent: 41 %."""
    return f"{value * 100:.0f} %"


def threads(number: int) -> str:
    """Return a number of CPU threads in words: 1 thread, 2 threads."""
    return f"{number} thread{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return `text` with control characters replaced, so that what a model wrote cannot steer a terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _scaled(value: float, base: float, suffixes: tuple[str, ...], space: str) -> str:
    if not math.isfinite(value):
        return "?"
    exponent = 0
    while abs(value) >= base - 0.5 and exponent < len(suffixes) - 1:
        value /= base
        exponent += 1
    digits = 0 if exponent == 0 or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f}{space}{suffixes[exponent]}"

"""The JSON documents that commands write: strict, whatever numbers they hold."""

import json
import math
import sys
from typing import Any


def write_json(document: dict[str, Any]) -> None:
    """Write the one document of a command under --json on stdout, as one line; see `to_json`."""
    sys.stdout.write(to_json(document) + "\n")
    sys.stdout.flush()


def to_json(document: dict[str, Any], indent: int | None = None) -> str:
    """Return `document` as strict JSON; numbers that JSON lacks (NaN, infinity) become null."""
    return json.dumps(_strict(document), allow_nan=False, indent=indent)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value

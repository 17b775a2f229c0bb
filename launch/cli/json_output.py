"""The one JSON document that a command writes on stdout under --json."""

import json
import math
import sys
from typing import Any


def write_json(document: dict[str, Any]) -> None:
    """Write `document` on stdout as one line of strict JSON; numbers that JSON lacks (NaN, infinity) become null."""
    sys.stdout.write(json.dumps(_strict(document), allow_nan=False) + "\n")
    sys.stdout.flush()


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value

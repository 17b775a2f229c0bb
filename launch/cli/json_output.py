"""The JSON documents that commands write: strict, whatever numbers they hold."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mfdist.errors import ConfigError


def _in_a_folder(file: Path | None) -> Path | None:
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"--json must name a file in a folder that is there; got {file}")
    return file


#: The option of a measurement that writes what it found; refused before anything is measured.
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write everything found to this file.", callback=_in_a_folder),
]


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

"""Where everything lies in a step's store: names and paths. Pure; touches no file.

A step is a zarr v3 group:

    step-000000123/                    attributes: format, format version, step, the run's attributes
      tables/<table>/weight            [num_rows, row_dim]
      tables/<table>/<optimiser state> [num_rows, …]
      dense/<part>/<part>…             any shape
      manifest/                        a group whose attributes list every file with its size and crc32c

How arrays are cut into files is in `grid.py`. Nothing depends on how many ranks wrote them.
"""

import re
from collections.abc import Iterable
from urllib.parse import quote, unquote

from mfdist.errors import ConfigError

FORMAT = "mfdist-checkpoint"
FORMAT_VERSION = 2

#: Longest path component most file systems accept, less what a writer appends to a temporary name.
MAX_PART_BYTES = 200

_STEP_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")


def step_name(step: int, revision: int = 1) -> str:
    """Return the directory name of a step; a step saved again has a higher revision and supersedes the earlier."""
    return f"step-{step:09d}" + (f"-{revision}" if revision > 1 else "")


def parse_step_name(name: str) -> tuple[int, int] | None:
    """Return (step, revision), or None if `name` is no committed step's."""
    match = _STEP_NAME.fullmatch(name)
    if match is None:
        return None
    step, revision = int(match[1]), int(match[2] or 1)
    return (step, revision) if step_name(step, revision) == name else None


def partial_name(step: int, pid: int, token: str) -> str:
    """Return the hidden name under which a step is written before it is committed.

    The token sets an attempt apart from an earlier, interrupted one whose last writes may still come.
    """
    return f".{step_name(step)}.partial-{pid}-{token}"


def removed_name(name: str, pid: int) -> str:
    """Return the hidden name a committed step takes in one rename before its files are deleted."""
    return f".{name}.removed-{pid}"


def is_leftover(name: str) -> bool:
    """Say whether `name` is what a writer that died left behind."""
    return re.fullmatch(r"\.step-\d{9,}(-\d+)?\.(partial-\d+-[0-9a-f]+|removed-\d+)", name) is not None


def encode_part(part: str) -> str:
    """Return one component of a name as it is spelt on disk: percent-encoded outside letters, digits, `_ . - ~`.

    Raises:
        ConfigError: the part is empty, too long for a file name, or not valid Unicode.
    """
    try:
        encoded = quote(part, safe="")
    except UnicodeEncodeError as error:
        raise ConfigError(f"a checkpoint name must be valid Unicode; got {part!r}; rename it.") from error
    # zarr reserves names of periods, names that start with "__", and the file "zarr.json".
    if encoded.startswith((".", "__")) or encoded == "zarr.json":
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    if not 0 < len(encoded) <= MAX_PART_BYTES:
        raise ConfigError(
            f"each part of a checkpoint name must take 1 to {MAX_PART_BYTES} bytes on disk; "
            f"got {part!r} ({len(encoded)} bytes); rename it."
        )
    return encoded


def table_path(table: str, array: str) -> str:
    """Return the path of a table's weight or optimiser state inside a step."""
    return f"tables/{encode_part(table)}/{encode_part(array)}"


def dense_path(name: str) -> str:
    """Return the path of any other tensor; each "/" in its name opens a group."""
    return "/".join(["dense", *(encode_part(part) for part in name.split("/"))])


def parse_path(path: str) -> tuple[str | None, str]:
    """Return (table, array) of a table's array, or (None, name) of a dense one; the inverse of the two above."""
    kind, *parts = (unquote(part) for part in path.split("/"))
    return (parts[0], parts[1]) if kind == "tables" else (None, "/".join(parts))


def describe(path: str) -> str:
    """Return how messages name an array."""
    table, name = parse_path(path)
    return f"tensor {name!r}" if table is None else f"table {table!r} {name}"


def check_paths(paths: Iterable[str]) -> None:
    """Raise ConfigError if one array would lie inside another."""
    taken = set(paths)
    for path in taken:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in taken:
                raise ConfigError(
                    f"a tensor's name must not continue another's; got {describe(path)} beside {describe(parent)}; "
                    "rename one."
                )

"""What is said when a configuration is wrong: the key, the value, the file and line, and the nearest right key."""

import difflib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails


def explain(
    error: ValidationError, *, text: str, origin: str, overrides: Mapping[str, str], keys: Sequence[str]
) -> str:
    """Return one line about the first thing that is wrong.

    Args:
        error: what validation found; unknown keys are told first, since a misspelt key also leaves one missing.
        text: the TOML text that was validated, to find lines in.
        origin: the name of that text, such as a path.
        overrides: dotted key → the `--set …` that gave it, the last of a key.
        keys: every dotted key there is.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        where = _override_of(key, overrides) or _line_of(text, location, origin)
        return f'unknown key "{key}" in {where}{_suggestion(key, keys)}'
    if problem["type"] == "missing":
        if key not in keys:
            return f"section [{key}] is missing in {origin}; add it to the file, or start from a preset"
        return f'key "{key}" is missing in {origin}; add it to the file or give --set {key}=...'
    message = _sentence(problem)
    if problem["type"] == "value_error":
        # The rule is between several keys; blame an override only when the message speaks of its key.
        said = [text for name, text in overrides.items() if _leaf(name) in message]
        return f"{message} (in {said[-1] if said else _line_of(text, location, origin)})"
    where = _override_of(key, overrides) or _line_of(text, location, origin)
    return f"{message}; got {key}={problem['input']!r} in {where}"


def first_problem(error: ValueError) -> str:
    """Return what is wrong with values that came from no TOML text, as the end of a sentence."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{key} is missing"
    return _sentence(problem) + (f"; got {key}={problem['input']!r}" if key else "")


def _sentence(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["msg"].startswith("Input "):
        return f"{problem['loc'][-1]} {message}"
    return message[:1].lower() + message[1:]


def _override_of(key: str, overrides: Mapping[str, str]) -> str | None:
    """Return the `--set …` that gave `key`, a part of it, or the whole it is part of."""
    for name, said in overrides.items():
        if name == key or name.startswith(f"{key}.") or key.startswith(f"{name}."):
            return said
    return None


def _line_of(text: str, location: Sequence[str], origin: str) -> str:
    """Return `origin, line N` of the longest part of `location` that has a line; `origin` alone where none has."""
    best_depth, best_line = 0, 0
    section: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        code = line.partition("#")[0].strip()
        if code.startswith("["):
            section = path = _parts(code.strip("[]"))
        elif "=" in code:
            path = section + _parts(code.partition("=")[0])
        else:
            continue
        depth = len(path)
        if best_depth < depth <= len(location) and path == list(location[:depth]):
            best_depth, best_line = depth, number
    return f"{origin}, line {best_line}" if best_line else origin


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _suggestion(key: str, keys: Sequence[str]) -> str:
    """Return what to write instead of `key`, as the end of a sentence.

    The same name in another section comes first (`training.num_heads` is surely `model.num_heads`), then a similar
    name in the same section, then the most similar of all.
    """
    section, _, leaf = key.rpartition(".")
    everywhere = [*_sections(keys), *keys]
    siblings = {_leaf(name): name for name in everywhere if name.rpartition(".")[0] == section}
    anywhere = {_leaf(name): name for name in reversed(everywhere)}  # of one name in two sections, the first
    nearest = (
        next((name for name in (*keys, *everywhere) if _leaf(name) == leaf), None)
        or next((siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)), None)
        or next((anywhere[name] for name in difflib.get_close_matches(leaf, anywhere, n=1, cutoff=0.7)), None)
    )
    if nearest is not None:
        return f'; did you mean "{nearest}"?'
    return f"; keys here are {', '.join(siblings)}" if siblings else ""


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _sections(keys: Sequence[str]) -> list[str]:
    """Return every section that `keys` name, outer ones too, in order."""
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")[:-1]
        found.update(dict.fromkeys(".".join(parts[:depth]) for depth in range(1, len(parts) + 1)))
    return list(found)

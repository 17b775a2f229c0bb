"""What differs between two committed steps, by their manifests where those tell, else by their values."""

from dataclasses import dataclass
from typing import Any

import torch

from mfdist.checkpoint.damage import Place
from mfdist.checkpoint.layout import parse_path
from mfdist.checkpoint.reader import read_parts
from mfdist.checkpoint.step_files import StepFiles, StoredArray


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An array that is not the same in both steps."""

    table: str | None
    array: str
    kind: str  # "values", "shape or dtype", "only in the first", "only in the second"
    changed_bytes: int = 0  # of the files that differ
    num_bytes: int = 0  # of all its files
    rows: tuple[int, int] | None = None  # from the first row in a file that differs to the row after the last


def compare_steps(first: StepFiles, second: StepFiles) -> list[Difference]:
    """Return the arrays that differ, in the first step's order; nothing is read of arrays cut alike.

    Raises:
        CheckpointError: a step is damaged where it has to be read.
    """
    ours, theirs = first.manifest.arrays, second.manifest.arrays
    one, other = first.arrays(ours), second.arrays(theirs)
    found = [_compare(first, second, one[path], other[path]) for path in ours if path in other]
    found += [_lonely(path, "only in the first") for path in ours if path not in other]
    found += [_lonely(path, "only in the second") for path in theirs if path not in one]
    return [difference for difference in found if difference is not None]


def compare_attributes(first: Any, second: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted key → (first, second) of what differs between two trees of attributes."""
    if isinstance(first, dict) and isinstance(second, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**first, **second}:
            found |= compare_attributes(first.get(key), second.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if first == second else {path: (first, second)}


def _compare(first: StepFiles, second: StepFiles, ours: StoredArray, theirs: StoredArray) -> Difference | None:
    table, array = parse_path(ours.path)
    if (ours.grid.shape, ours.dtype) != (theirs.grid.shape, theirs.dtype):
        return Difference(table=table, array=array, kind="shape or dtype")
    places = ours.places()
    sizes = [first.manifest.files[place.file].num_bytes for place in places if place.file in first.manifest.files]
    if ours.grid != theirs.grid:  # cut by another version of the format
        is_same = _is_same(_values(first, ours), _values(second, theirs))
        rows, changed = ours.grid.region.rows, sum(sizes)
    else:
        differing = [place for place in places if _told(first, place) != _told(second, place)]
        regions = [place.region for place in differing if place.region is not None]
        is_same = not regions
        rows = (min(r.rows[0] for r in regions), max(r.rows[1] for r in regions)) if regions else (0, 0)
        changed = sum(first.manifest.files[place.file].num_bytes for place in differing)
    if is_same:
        return None
    return Difference(table=table, array=array, kind="values", changed_bytes=changed, num_bytes=sum(sizes), rows=rows)


def _told(files: StepFiles, place: Place) -> tuple[int, str] | None:
    entry = files.manifest.files.get(place.file)
    return None if entry is None else (entry.num_bytes, entry.crc32c)


def _values(files: StepFiles, array: StoredArray) -> torch.Tensor:
    values = torch.empty(array.grid.shape, dtype=array.dtype)
    read_parts(files, [(array, [(array.grid.region, values)])])
    return values


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare bits, for which NaN equals itself."""
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _lonely(path: str, kind: str) -> Difference:
    table, array = parse_path(path)
    return Difference(table=table, array=array, kind=kind)

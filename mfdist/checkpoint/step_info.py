"""A committed step, in a few numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mfdist.checkpoint.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """A committed step, as its manifest describes it."""

    step: int
    path: Path | str  # an URL is text
    num_bytes: int = 0
    num_files: int = 0
    num_tables: int = 0
    written_bytes: int = 0  # what its save wrote; the rest are files it shares with earlier steps
    created: str = ""  # ISO 8601, UTC
    damage: str | None = None  # why the manifest cannot be read; then the fields above but `path` and `step` are empty

    @classmethod
    def of(cls, step: int, path: Path | str, manifest: Manifest) -> Self:
        """Return what a manifest says."""
        return cls(
            step=step,
            path=path,
            num_bytes=manifest.num_bytes,
            num_files=len(manifest.files),
            num_tables=len({array.split("/")[1] for array in manifest.arrays if array.startswith("tables/")}),
            written_bytes=manifest.written_bytes,
            created=manifest.created,
        )

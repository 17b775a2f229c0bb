"""What can be wrong with a committed step."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfdist.checkpoint.layout import parse_path

if TYPE_CHECKING:
    from mfdist.spec import Region


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file of a step that is not what was saved."""

    step: int
    file: str  # path inside the step's directory
    problem: str  # a phrase that goes on from the file's name
    table: str | None = None
    array: str | None = None  # "weight", an optimiser state, or the name of a dense tensor
    rows: tuple[int, int] | None = None  # first row, row after the last
    columns: tuple[int, int] | None = None  # likewise, where the file does not hold all of them

    def __str__(self) -> str:
        what = f"table {self.table!r} {self.array}" if self.table else f"tensor {self.array!r}" if self.array else ""
        for kind, span in (("rows", self.rows), ("columns", self.columns)):
            if span:
                what += f" {kind} {span[0]} to {span[1] - 1}"
        return f"step {self.step}: {what + ': ' if what else ''}{self.file} {self.problem}"


@dataclass(frozen=True)
class Place:
    """A file of a step, and what it holds as far as that is known."""

    file: str  # path inside the step's directory
    path: str | None = None  # of the array
    region: "Region | None" = None
    num_columns: int | None = None  # of the array

    def damage(self, step: int, problem: str) -> Damage:
        """Return the file's damage."""
        table, array = parse_path(self.path) if self.path is not None else (None, None)
        rows = columns = None
        if self.region is not None:
            rows = self.region.rows
            columns = self.region.columns if self.region.columns != (0, self.num_columns) else None
        return Damage(step=step, file=self.file, problem=problem, table=table, array=array, rows=rows, columns=columns)


class UnsoundFile(Exception):
    """A file is not what the manifest says; a phrase that goes on from its name. Always caught in this package."""

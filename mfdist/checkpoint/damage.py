"""What can be wrong with a committed step."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file of a step that is not what was saved."""

    step: int
    file: str  # path inside the step's directory
    problem: str  # a phrase that goes on from the file's name
    table: str | None = None
    array: str | None = None  # "weight", an optimiser state, or the name of a dense tensor
    rows: tuple[int, int] | None = None  # first row, row after the last

    def __str__(self) -> str:
        what = f"table {self.table!r} {self.array}" if self.table else f"tensor {self.array!r}" if self.array else ""
        if self.rows:
            what += f" rows {self.rows[0]} to {self.rows[1] - 1}"
        return f"step {self.step}: {what + ': ' if what else ''}{self.file} {self.problem}"

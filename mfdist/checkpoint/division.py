"""Which rank writes which file of an array, and which ranks contribute to a file that no rank holds whole. Pure.

Every rank computes this from what all ranks hold, and so they agree without a word. A file that one rank holds whole is
written by it alone. One that lies across shards is written by the rank with the largest piece, its owner; the others
write theirs to files beside it, from which the owner completes it. Nothing is gathered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mfdist.checkpoint.grid import FileGrid
from mfdist.checkpoint.layout import describe
from mfdist.errors import ConfigError
from mfdist.spec import Region


@dataclass(frozen=True)
class Piece:
    """A region of a file, and who has it."""

    rank: int
    part: int  # which of the rank's parts of the array
    region: Region


@dataclass(frozen=True)
class FilePlan:
    """One file of an array, and the pieces it is made of; the first is its owner's, and the largest."""

    path: str  # of the array in the step
    file: str
    region: Region
    pieces: tuple[Piece, ...]

    @property
    def owner(self) -> int:
        """Return the rank that writes it."""
        return self.pieces[0].rank

    @property
    def name(self) -> str:
        """Return the file's path in the step."""
        return f"{self.path}/{self.file}"

    def borrowed(self) -> Iterator[tuple[int, Piece]]:
        """Yield (number, piece) of those that are not the owner's."""
        return ((number, piece) for number, piece in enumerate(self.pieces) if piece.rank != self.owner)


def divide(path: str, grid: FileGrid, held: Sequence[Sequence[Region]], rank: int) -> Iterator[FilePlan]:
    """Yield the plans of the files that `rank` has a piece of.

    Args:
        path: the array's.
        grid: its cut.
        held: for each rank, the regions of its parts.
        rank: whose files are wanted.

    Raises:
        ConfigError: the ranks together do not cover the array.
    """
    parts = [Piece(owner, part, region) for owner, mine in enumerate(held) for part, region in enumerate(mine)]
    _minimal(grid.region, parts, path)
    seen: set[str] = set()
    for region in held[rank]:
        for file, covered in grid.files_in(region):
            if file in seen:
                continue
            seen.add(file)
            pieces = _pieces(grid, covered, parts, path)
            if any(piece.rank == rank for piece in pieces):
                yield FilePlan(path, file, covered, pieces)


def _pieces(grid: FileGrid, file: Region, parts: Sequence[Piece], path: str) -> tuple[Piece, ...]:
    found = []
    for piece in parts:
        (top, bottom), (left, right) = piece.region.rows, piece.region.columns
        if top < file.rows[1] and bottom > file.rows[0] and left < file.columns[1] and right > file.columns[0]:
            found.append(Piece(piece.rank, piece.part, piece.region.intersection(file)))
    whole = [piece for piece in found if piece.region == file]
    if whole:  # replicas take turns
        number = file.rows[0] // grid.rows_per_file + file.columns[0] // grid.columns_per_file
        return (whole[number % len(whole)],)
    return _minimal(file, found, path)


def _minimal(target: Region, pieces: Sequence[Piece], path: str) -> tuple[Piece, ...]:
    """Return pieces that cover `target`, the largest first, leaving out those that add nothing."""
    if target.is_empty:
        return ()
    row_cuts = sorted({*target.rows, *(row for piece in pieces for row in piece.region.rows)})
    column_cuts = sorted({*target.columns, *(column for piece in pieces for column in piece.region.columns)})
    open_cells = {
        (row, column)
        for row in pairwise(row_cuts)
        for column in pairwise(column_cuts)
        if target.rows[0] <= row[0] < target.rows[1] and target.columns[0] <= column[0] < target.columns[1]
    }
    chosen = []
    for piece in sorted(pieces, key=lambda piece: (-piece.region.shape[0] * piece.region.shape[1], piece.rank)):
        (top, bottom), (left, right) = piece.region.rows, piece.region.columns
        cells = {cell for cell in open_cells if top <= cell[0][0] < bottom and left <= cell[1][0] < right}
        if cells:
            chosen.append(piece)
            open_cells -= cells
    if open_cells:
        (top, bottom), (left, right) = min(open_cells)
        raise ConfigError(
            f"the ranks' shards must cover every table; nobody holds rows {top} to {bottom - 1}, columns {left} to "
            f"{right - 1} of {describe(path)}; save with all its shards."
        )
    return tuple(chosen)

"""How an array is cut into files and chunks. Pure; depends on shape and item size alone, never on who writes it.

Every array is seen as rows × columns: a number is 1 × 1, a vector R × 1, and what has more dimensions has its trailing
ones laid flat. A file holds a rectangle of it, cut along its rows into chunks; within a file everything is contiguous.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mfdist.spec import Region

#: A file is the unit of writing, of checksums and of sharing between steps: small, so that few rows are written for one
#: that changed, though not so small that the disk minds; larger in large arrays, so that there are not too many.
MIN_FILE_BYTES = 2 << 20
MAX_FILE_BYTES = 8 << 20
FILES_PER_ARRAY = 1024
#: Chunks in one file; a chunk is what a zarr reader decodes to look up a row.
CHUNKS_PER_FILE = 4
#: Column blocks let column shards write files of their own; a matrix has at most this many, none narrower than that.
MAX_COLUMN_BLOCKS = 8
MIN_COLUMNS = 64


@dataclass(frozen=True)
class FileGrid:
    """An array's shape and the sizes of its chunks and files; files are as wide as their chunks."""

    shape: tuple[int, ...]
    rows_per_chunk: int
    rows_per_file: int
    columns_per_file: int

    @property
    def region(self) -> Region:
        """Return the whole array, as rows × columns."""
        return Region(rows=(0, num_rows(self.shape)), columns=(0, num_columns(self.shape)))

    def num_bytes(self, item_bytes: int) -> int:
        """Return the size of the array's values."""
        return math.prod(self.shape) * item_bytes

    def files(self) -> Iterator[tuple[str, Region]]:
        """Yield (file name inside the array's directory, what it holds), by rows, then by columns."""
        return self.files_in(self.region)

    def files_in(self, region: Region) -> Iterator[tuple[str, Region]]:
        """Yield the files that hold any of `region`."""
        if region.is_empty:
            return
        last_row, last_column = self.region.rows[1], self.region.columns[1]
        for i in _blocks(region.rows, self.rows_per_file):
            for j in _blocks(region.columns, self.columns_per_file):
                begin, left = i * self.rows_per_file, j * self.columns_per_file
                rows = (begin, min(begin + self.rows_per_file, last_row))
                yield (
                    self._name(i, j),
                    Region(rows=rows, columns=(left, min(left + self.columns_per_file, last_column))),
                )

    def num_chunks(self, file: Region) -> int:
        """Return how many chunks the file that holds `file` has; the last is padded with zeros to its full size."""
        return math.ceil(file.shape[0] / self.rows_per_chunk)

    def _name(self, i: int, j: int) -> str:
        indices = [i, j, *(0 for _ in self.shape[2:])][: len(self.shape)]
        return ".".join(["c", *map(str, indices)])


def num_rows(shape: tuple[int, ...]) -> int:
    """Return the rows of an array of this shape."""
    return shape[0] if shape else 1


def num_columns(shape: tuple[int, ...]) -> int:
    """Return the columns of an array of this shape."""
    return math.prod(shape[1:])


def cut(shape: tuple[int, ...], item_bytes: int) -> FileGrid:
    """Cut an array into files of MIN_FILE_BYTES to MAX_FILE_BYTES (or one row), of about CHUNKS_PER_FILE chunks.

    An array of one file has even chunks, so that little is padded. A larger one has a power of two of rows in a file,
    and a matrix about as many column blocks as row blocks up to MAX_COLUMN_BLOCKS, again a power of two: so that the
    files of the usual shards, halves of halves of either kind, have one writer each.
    """
    rows, columns = max(1, num_rows(shape)), max(1, num_columns(shape))
    file_bytes = MIN_FILE_BYTES
    while file_bytes < MAX_FILE_BYTES and file_bytes * FILES_PER_ARRAY < rows * columns * item_bytes:
        file_bytes *= 2
    chunk_bytes = file_bytes // CHUNKS_PER_FILE
    num_files = rows * columns * item_bytes / file_bytes
    if num_files <= 1:
        num_chunks = math.ceil(rows / max(1, chunk_bytes // (columns * item_bytes)))
        rows_per_chunk = math.ceil(rows / num_chunks)
        return FileGrid(shape, rows_per_chunk, rows_per_chunk * math.ceil(rows / rows_per_chunk), columns)
    num_blocks = 1
    while len(shape) == 2 and num_blocks < MAX_COLUMN_BLOCKS and (2 * num_blocks) ** 2 <= num_files:
        if columns // (2 * num_blocks) < MIN_COLUMNS:
            break
        num_blocks *= 2
    columns_per_file = math.ceil(columns / num_blocks)
    rows_per_chunk = 1 << (max(1, chunk_bytes // (columns_per_file * item_bytes)).bit_length() - 1)
    num_chunks = math.ceil(rows / rows_per_chunk)
    return FileGrid(shape, rows_per_chunk, rows_per_chunk * min(CHUNKS_PER_FILE, num_chunks), columns_per_file)


def _blocks(span: tuple[int, int], size: int) -> range:
    return range(span[0] // size, (span[1] - 1) // size + 1)

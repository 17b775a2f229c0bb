"""Arrays of a committed step as memory: their files, mapped one after another where the array's blocks lie.

Chunks are uncompressed and stored in order, so a file is a block of rows as memory has them, and what follows them (the
index) begins a page of its own wherever another file comes next. Nothing is read here; pages come when touched.
"""

import ctypes
import errno
import mmap
import os
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

from mfdist.checkpoint.damage import UnsoundFile
from mfdist.checkpoint.grid import FileGrid
from mfdist.checkpoint.reader import read_whole
from mfdist.checkpoint.step_files import StepFiles, StoredArray
from mfdist.checkpoint.zarr_format import index_bytes, offsets_in
from mfdist.errors import CheckpointError
from mfdist.spec import Region
from mfdist.tables.mapped import MappedRows

_MAP_FIXED = 0x10
_MADV_RANDOM = 1
_FAILED = ctypes.c_void_p(-1).value


def map_rows(files: StepFiles, array: StoredArray) -> MappedRows:
    """Return a matrix's rows as memory that the step's files back.

    Their sizes and indices are compared with the manifest; their checksums are not, which would read everything:
    `mfdist checkpoint verify` does that. Where full files do not end with a page, as some odd widths have it, they
    cannot lie side by side, and the rows are read instead.

    Args:
        files: a step in a folder of this machine.
        array: [num_rows, row_dim].

    Returns:
        Rows that live as long as their tensor, also if the files are removed meanwhile. Writing to them ends the
        process.

    Raises:
        CheckpointError: a file is missing, or not of the size or form that was saved.
    """
    grid, item_bytes = array.grid, array.dtype.itemsize
    num_rows, num_columns = grid.region.shape
    file_bytes = _file_bytes(grid, item_bytes)
    row_files = -(-num_rows // grid.rows_per_file)
    num_blocks = -(-num_columns // grid.columns_per_file)
    if sys.platform != "linux" or (row_files * num_blocks > 1 and file_bytes % mmap.PAGESIZE):
        return MappedRows(read_whole(files, {array.path: array})[array.path])
    memory = _Reserved(num_blocks * row_files * file_bytes)
    for place in array.places():
        assert place.region is not None
        try:
            offset = _number(place.region, grid, row_files) * file_bytes
            memory.back(offset, Path(files.root) / place.file, _data_bytes(files, place.file, place.region, array))
        except (OSError, UnsoundFile) as error:
            problem = str(error) if isinstance(error, UnsoundFile) else f"cannot be mapped ({error.strerror})"
            raise CheckpointError(
                f"a checkpoint must be what was saved; {place.damage(files.manifest.step, problem)}, in {files.root}; "
                "load another step, or copy the file from elsewhere."
            ) from error
    block_rows = row_files * grid.rows_per_file
    return MappedRows(memory.tensor(array.dtype).view(num_blocks * block_rows, grid.columns_per_file), num_blocks)


class _Reserved:
    """A range of addresses, into which files are mapped read-only. It is given back with the last tensor on it."""

    def __init__(self, num_bytes: int) -> None:
        self._size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._address = _mmap(None, self._size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._array = (ctypes.c_char * num_bytes).from_address(self._address)
        weakref.finalize(self._array, _libc().munmap, ctypes.c_void_p(self._address), ctypes.c_size_t(self._size))

    def back(self, offset: int, path: Path, num_bytes: int) -> None:
        """Lay the first bytes of a file at an offset, which is that of a page."""
        fd = os.open(path, os.O_RDONLY)
        try:
            _mmap(self._address + offset, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, fd)
        finally:
            os.close(fd)
        # Rows are read here and there: what lies around them is not worth reading from a disk.
        _libc().madvise(ctypes.c_void_p(self._address + offset), ctypes.c_size_t(num_bytes), _MADV_RANDOM)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Return the memory as a flat tensor."""
        return torch.frombuffer(self._array, dtype=dtype)


def _data_bytes(files: StepFiles, name: str, region: Region, array: StoredArray) -> int:
    """Return how many bytes of chunks a file begins with, after seeing that they are as many and in order."""
    entry = files.manifest.files.get(name)
    if entry is None:
        raise UnsoundFile("is not in the manifest")
    grid, item_bytes = array.grid, array.dtype.itemsize
    try:
        fd = os.open(Path(files.root) / name, os.O_RDONLY)
    except FileNotFoundError:
        raise UnsoundFile("is missing") from None
    try:
        if (size := os.fstat(fd).st_size) != entry.num_bytes:
            raise UnsoundFile(f"has {size} bytes, not the {entry.num_bytes} in the manifest")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # or the system would read all of the file along
        begin = max(0, size - index_bytes(grid))
        offsets = offsets_in(grid, region, os.pread(fd, size - begin, begin), begin, item_bytes)
    except ValueError as error:
        raise UnsoundFile(f"cannot be used: {error}") from error
    finally:
        os.close(fd)
    chunk_bytes = grid.rows_per_chunk * grid.columns_per_file * item_bytes
    if offsets != [number * chunk_bytes for number in range(len(offsets))]:
        raise UnsoundFile("cannot be mapped: its chunks are not in order; load the step and save it again")
    return len(offsets) * chunk_bytes


def _number(region: Region, grid: FileGrid, row_files: int) -> int:
    """Return a file's place in memory: by blocks of columns, then by rows."""
    return region.columns[0] // grid.columns_per_file * row_files + region.rows[0] // grid.rows_per_file


def _file_bytes(grid: FileGrid, item_bytes: int) -> int:
    return grid.rows_per_file * grid.columns_per_file * item_bytes


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mmap(address: int | None, num_bytes: int, protection: int, flags: int, fd: int) -> int:
    function = _libc().mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    found = function(address, num_bytes, protection, flags, fd, 0)
    if found in (None, _FAILED):
        number = ctypes.get_errno()
        hint = "; raise vm.max_map_count" if number == errno.ENOMEM else ""
        raise OSError(number, f"{os.strerror(number)}{hint}")
    return int(found)

"""The parts of zarr v3 that a step is made of: its JSON documents, and where the chunks of a file lie. Pure.

Chunks are uncompressed, so a file is its rows as they lie in memory, then the index of the sharding codec. That is
little enough to write here, and it lets several ranks contribute to a step, checksums be taken from memory, and
unchanged files be shared; see docs/decisions/ for what was measured. Tests read everything with zarr and tensorstore.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from mfdist.checkpoint.checksum import crc32c
from mfdist.checkpoint.grid import FileGrid
from mfdist.spec import Region

_ENTRY = 16  # bytes of an index entry: offset and size of a chunk, little-endian
_NO_CHUNK = 2**64 - 1
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """Return the zarr.json of a group."""
    return _document({"attributes": dict(attributes), "node_type": "group", "zarr_format": 3})


def array_document(grid: FileGrid, dtype: str, item_bytes: int, attributes: Mapping[str, Any]) -> bytes:
    """Return the zarr.json of an array of zarr's data type `dtype`."""
    codecs: list[Any] = [{"name": "bytes"} | ({"configuration": {"endian": "little"}} if item_bytes > 1 else {})]
    chunk, file = (_block_shape(grid, rows) for rows in (grid.rows_per_chunk, grid.rows_per_file))
    if chunk != file:
        sharding = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": _INDEX_CODECS, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _document(
        {
            "attributes": dict(attributes),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
            # No directory a file, as "c/0/0" would have.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": codecs,
            "data_type": dtype,
            "fill_value": _zero(dtype),
            "node_type": "array",
            "shape": list(grid.shape),
            "storage_transformers": [],
            "zarr_format": 3,
        }
    )


def read_array_document(raw: bytes) -> tuple[FileGrid, Mapping[str, Any]]:
    """Return how an array is cut, and its attributes.

    Raises:
        ValueError, KeyError, TypeError: it is not a document as written here, or by an earlier mfdist through zarr.
    """
    document = json.loads(raw)
    shape = tuple(document["shape"])
    file = chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
    [codec] = document["codecs"]
    if codec["name"] == "sharding_indexed":
        chunk = codec["configuration"]["chunk_shape"]
    if document["node_type"] != "array" or chunk[1:] != file[1:] or file[2:] != [max(1, dim) for dim in shape[2:]]:
        raise ValueError("it is cut in another way than mfdist does")
    rows_per_chunk, rows_per_file = (chunk[0], file[0]) if shape else (1, 1)
    return FileGrid(shape, rows_per_chunk, rows_per_file, math.prod(file[1:])), document["attributes"]


def is_sharded(grid: FileGrid) -> bool:
    """Return whether a file is several chunks with an index."""
    return grid.rows_per_file > grid.rows_per_chunk


def index_of(grid: FileGrid, file: Region, item_bytes: int) -> bytes:
    """Return what follows the chunks of the file that holds `file`: the index of the sharding codec, and its crc32c."""
    if not is_sharded(grid):
        return b""
    chunk_bytes = grid.rows_per_chunk * grid.columns_per_file * item_bytes
    entries: list[int] = []
    for number in range(grid.rows_per_file // grid.rows_per_chunk):
        entries += [number * chunk_bytes, chunk_bytes] if number < grid.num_chunks(file) else [_NO_CHUNK, _NO_CHUNK]
    index = struct.pack(f"<{len(entries)}Q", *entries)
    return index + struct.pack("<I", crc32c(index))


def chunk_offsets(grid: FileGrid, file: Region, data: memoryview, item_bytes: int) -> list[int]:
    """Return where each chunk begins in `data`, the contents of the file that holds `file`.

    Raises:
        ValueError: a chunk is missing or lies outside.
    """
    begin = max(0, len(data) - index_bytes(grid))
    return offsets_in(grid, file, bytes(data[begin:]), begin, item_bytes)


def index_bytes(grid: FileGrid) -> int:
    """Return how many bytes at the end of a file are its index; 0 where it has none."""
    return grid.rows_per_file // grid.rows_per_chunk * _ENTRY + 4 if is_sharded(grid) else 0


def offsets_in(grid: FileGrid, file: Region, index: bytes, begin: int, item_bytes: int) -> list[int]:
    """Return what `chunk_offsets` does from a file's index alone, which begins at `begin` in it."""
    num_chunks = grid.num_chunks(file)
    if not is_sharded(grid):
        return [0]
    chunk_bytes = grid.rows_per_chunk * grid.columns_per_file * item_bytes
    is_whole = len(index) == index_bytes(grid)
    entries = struct.unpack(f"<{(len(index) - 4) // 8}Q", index[:-4]) if is_whole else ()
    offsets, sizes = list(entries[: 2 * num_chunks : 2]), set(entries[1 : 2 * num_chunks : 2])
    if sizes != {chunk_bytes} or max(offsets) + chunk_bytes > begin:
        raise ValueError("its index does not say where its chunks are")
    return offsets


def _block_shape(grid: FileGrid, rows: int) -> list[int]:
    trailing = [grid.columns_per_file] if len(grid.shape) == 2 else [max(1, dim) for dim in grid.shape[1:]]
    return [rows, *trailing] if grid.shape else []


def _zero(dtype: str) -> Any:
    if dtype == "bool":
        return False
    return [0.0, 0.0] if "complex" in dtype else 0.0 if "float" in dtype else 0


def _document(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"

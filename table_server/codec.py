"""Tensors as messages: raw little-endian bytes with dtype, shape and checksum, cut into blocks that fit a message."""

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mfdist.checkpoint.checksum import crc32c
from mfdist.errors import ConfigError, ConsistencyError
from mfdist.table_server.proto import table_v1_pb2 as pb

#: Bytes of tensors in one message, about; a message has a few hundred more. Larger ones are not faster.
BLOCK_BYTES = 2 << 20
#: What a server and a client accept, with room for one row or token that is wider than a block.
MAX_MESSAGE_BYTES = 16 << 20

DTYPES: dict[pb.DType, torch.dtype] = {
    pb.FLOAT32: torch.float32,
    pb.FLOAT16: torch.float16,
    pb.BFLOAT16: torch.bfloat16,
    pb.FLOAT8_E4M3FN: torch.float8_e4m3fn,
    pb.FLOAT8_E5M2: torch.float8_e5m2,
    pb.UINT8: torch.uint8,
    pb.UINT16: torch.uint16,
    pb.INT32: torch.int32,
    pb.INT64: torch.int64,
}
_CODES: dict[torch.dtype, pb.DType] = {dtype: code for code, dtype in DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("table servers speak little-endian; this machine does not")


def dtype_code(dtype: torch.dtype) -> pb.DType:
    """Return the protocol's number of a dtype.

    Raises:
        ConfigError: it cannot travel.
    """
    if dtype not in _CODES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _CODES)
        raise ConfigError(f"tensors travel as one of {names}; got {dtype}")
    return _CODES[dtype]


def dtype_of(code: pb.DType, what: str) -> torch.dtype:
    """Return the dtype that a message names.

    Raises:
        ConfigError: it names none.
    """
    if code not in DTYPES:
        raise ConfigError(f"{what} must name a dtype of the protocol; got {code}")
    return DTYPES[code]


def packed(tensor: Tensor) -> pb.Tensor:
    """Return a tensor of any shape as a message, copied to the host."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return pb.Tensor(dtype=dtype_code(tensor.dtype), shape=tensor.shape, data=data, crc32c=crc32c(data))


def unpacked(messages: Sequence[pb.Tensor], what: str) -> Tensor:
    """Return what messages hold one after the other, joined along the first dimension, in new memory.

    Args:
        messages: one at least, of one dtype, alike in all dimensions but the first.
        what: what errors call it.

    Raises:
        ConfigError: shape and bytes do not fit together, or the messages not to each other.
        ConsistencyError: the bytes are not those that were sent.
    """
    dtype, tail = dtype_of(messages[0].dtype, f"{what}'s dtype"), tuple(messages[0].shape[1:])
    rows = 0
    for message in messages:
        shape = tuple(message.shape)
        if not shape or min(shape) < 0 or message.dtype != messages[0].dtype or shape[1:] != tail:
            raise ConfigError(
                f"{what} must be a tensor of one dtype and width in all messages; got shape {list(shape)} after "
                f"{list(messages[0].shape)}"
            )
        rows += shape[0]
    row_bytes = dtype.itemsize * int(np.prod(tail, dtype=object) if tail else 1)
    out = np.empty(rows * row_bytes if rows * row_bytes < sys.maxsize else 0, np.uint8)
    at = 0
    for message in messages:
        data, size = message.data, message.shape[0] * row_bytes
        if len(data) != size:
            raise ConfigError(f"{what} of shape {list(message.shape)} must be {size} bytes; got {len(data)}")
        if message.HasField("crc32c") and crc32c(data) != message.crc32c:
            raise ConsistencyError(
                f"{what} must arrive as it was sent; its checksum is {crc32c(data):08x}, sent was "
                f"{message.crc32c:08x}; send it again"
            )
        out[at : at + size] = np.frombuffer(data, np.uint8)
        at += size
    return torch.from_numpy(out).view(dtype).view(rows, *tail)


def blocks(length: int, item_bytes: int) -> Iterator[slice]:
    """Yield slices of `length` tokens or rows that fit a message; one at least, also of nothing."""
    step = max(1, BLOCK_BYTES // max(1, item_bytes))
    for begin in range(0, max(1, length), step):
        yield slice(begin, min(length, begin + step))

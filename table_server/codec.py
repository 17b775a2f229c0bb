"""Tensors as messages: raw little-endian bytes with dtype, shape and checksum, cut into blocks that fit a message."""

import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mfdist.checkpoint.checksum import crc32c
from mfdist.errors import ConfigError, ConsistencyError
from mfdist.sharding.wire import Wire
from mfdist.table_server.proto import table_v1_pb2 as pb

#: Bytes of tensors in one message, about; a message has a few hundred more. Larger ones are not faster.
BLOCK_BYTES = 2 << 20
#: What a server and a client accept, with room for one row or token that is wider than a block.
MAX_MESSAGE_BYTES = 16 << 20
#: Of a dimension; a tensor without elements may claim any.
_MAX_LENGTH = 1 << 31

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
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_BYTES = 4
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


def packed(tensor: Tensor, dtype: torch.dtype | None = None) -> pb.Tensor:
    """Return a tensor of any shape as a message, copied to the host.

    Args:
        tensor: what travels.
        dtype: as what; by default as it is. In fp8, for tensors [M, D], each row travels with a scale.
    """
    tensor = tensor.detach().cpu()
    scales = b""
    if dtype in _FP8 and tensor.dtype != dtype:
        scaled = Wire(torch.float32, dtype).encode(tensor.float())
        tensor, scales = scaled[:, :-_SCALE_BYTES].contiguous().view(dtype), _bytes_of(scaled[:, -_SCALE_BYTES:])
    elif dtype is not None:
        tensor = tensor.to(dtype)
    data = _bytes_of(tensor)
    code, check = dtype_code(tensor.dtype), crc32c(data)
    return pb.Tensor(dtype=code, shape=tensor.shape, data=data, crc32c=check, row_scales=scales)


def unpacked(messages: Sequence[pb.Tensor], what: str) -> Tensor:
    """Return what messages hold one after the other, joined along the first dimension, in new memory.

    Args:
        messages: one at least, of one dtype, alike in all dimensions but the first.
        what: what errors call it.

    Returns:
        A tensor of the dtype that travelled; of rows with scales, their values in fp32.

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
        if len(shape) > 2 or max(shape) >= _MAX_LENGTH:
            raise ConfigError(f"{what} must have one or two dimensions below 2**31; got shape {list(shape)}")
        rows += shape[0]
    row_bytes = dtype.itemsize * math.prod(tail)
    data = [message.data for message in messages]
    for message, received in zip(messages, data, strict=True):
        _check_bytes(message, received, message.shape[0] * row_bytes, what)
    whole = torch.empty(sum(map(len, data)), dtype=torch.uint8)
    joined, at = whole.numpy(), 0
    for received in data:
        joined[at : at + len(received)] = np.frombuffer(received, np.uint8)
        at += len(received)
    values = whole.view(dtype).view(rows, *tail)
    if not messages[0].row_scales:
        return values
    scales = b"".join(message.row_scales for message in messages)
    if len(scales) != rows * _SCALE_BYTES or values.ndim != 2 or dtype not in _FP8:
        raise ConfigError(f"{what} in {dtype} must have one scale a row; got {len(scales)} bytes for {rows} rows")
    return values.float() * torch.from_numpy(np.frombuffer(scales, np.float32).copy())[:, None]


def _check_bytes(message: pb.Tensor, data: bytes, size: int, what: str) -> None:
    if len(data) != size:
        raise ConfigError(f"{what} of shape {list(message.shape)} must be {size} bytes; got {len(data)}")
    if message.HasField("crc32c") and crc32c(data) != message.crc32c:
        raise ConsistencyError(
            f"{what} must arrive as it was sent; its checksum is {crc32c(data):08x}, sent was {message.crc32c:08x}; "
            "send it again"
        )


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def blocks(length: int, item_bytes: int) -> Iterator[slice]:
    """Yield slices of `length` tokens or rows that fit a message; one at least, also of nothing."""
    step = max(1, BLOCK_BYTES // max(1, item_bytes))
    for begin in range(0, max(1, length), step):
        yield slice(begin, min(length, begin + step))

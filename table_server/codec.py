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
from mfdist.table_server.frames import Bytes, Frame, frame_of
from mfdist.table_server.proto import table_v1_pb2 as pb

#: Bytes of tensors in one message, about; a message has a few hundred more. Larger ones are not faster.
BLOCK_BYTES = 2 << 20
#: Of the sums that one message of a lookup asks for: kernels copy rows once where many tokens read them.
SUMS_BYTES = 8 << 20
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
        raise ConfigError(f"tensors travel as one of {', '.join(map(dtype_name, _CODES))}; got {dtype_name(dtype)}")
    return _CODES[dtype]


def dtype_of(code: pb.DType, what: str) -> torch.dtype:
    """Return the dtype that a message names.

    Raises:
        ConfigError: it names none.
    """
    if code not in DTYPES:
        raise ConfigError(f"{what} must name a dtype of the protocol; got {code}")
    return DTYPES[code]


def sums_dtype_of(code: pb.DType, what: str) -> torch.dtype:
    """Return the dtype that a message names for sums.

    Raises:
        ConfigError: it names none, or one of integers, which would cut sums off.
    """
    dtype = dtype_of(code, what)
    if not dtype.is_floating_point:
        names = ", ".join(dtype_name(each) for each in _CODES if each.is_floating_point)
        raise ConfigError(f"{what} must be floating point, one of {names}; got {dtype_name(dtype)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return what messages call a dtype."""
    return str(dtype).removeprefix("torch.")


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Return the bytes of a row of values as `packed` sends it, with its scale in fp8."""
    return width * dtype.itemsize + (_SCALE_BYTES if dtype in _FP8 else 0)


def packed(tensor: Tensor, dtype: torch.dtype | None = None) -> Frame:
    """Return a tensor of any shape as it travels; on the host and contiguous, the frame's data are the tensor's own.

    Args:
        tensor: what travels.
        dtype: as what; by default as it is. In fp8, for tensors [M, D], each row travels with a scale.
    """
    tensor = tensor.detach().cpu()
    scales = b""
    if dtype in _FP8 and tensor.dtype != dtype:
        scaled = Wire(torch.float32, dtype).encode(tensor.float())
        tensor = scaled[:, :-_SCALE_BYTES].contiguous().view(dtype)
        scales = bytes(_bytes_of(scaled[:, -_SCALE_BYTES:]))
    elif dtype is not None:
        tensor = tensor.to(dtype)
    data = _bytes_of(tensor)
    head = pb.Tensor(dtype=dtype_code(tensor.dtype), shape=tensor.shape, crc32c=crc32c(data), row_scales=scales)
    return Frame(head, data=data)


def packed_message(tensor: Tensor, dtype: torch.dtype | None = None) -> pb.Tensor:
    """Return a tensor as `packed` does, as a message of protobuf's own, which holds a copy."""
    frame = packed(tensor, dtype)
    frame.head.data = bytes(frame.data or b"")
    message: pb.Tensor = frame.head
    return message


class Joining:
    """Tensors that come one after the other, joined along the first dimension in new memory while they come.

    Args:
        num_rows: of all of them together.
        what: what errors call it.
    """

    def __init__(self, num_rows: int, what: str) -> None:
        self._num_rows, self._what = num_rows, what
        self._first: pb.Tensor | None = None
        self._values = torch.empty(0)
        self._bytes = np.empty(0, np.uint8)
        self._at = self._rows = 0
        self._scales: list[bytes] = []

    def add(self, tensor: Frame) -> None:
        """Take in the next tensor.

        Raises:
            ConfigError: its shape and bytes do not fit together, or to what came before.
            ConsistencyError: the bytes are not those that were sent.
        """
        head, data, what = tensor.head, tensor.data or b"", self._what
        _check_shape(head, len(data), self._first or head, what)
        _check_sum(head, data, what)
        dtype, shape = DTYPES[head.dtype], tuple(head.shape)
        if (rows := self._rows + shape[0]) > self._num_rows:
            raise ConfigError(f"{what} must be {self._num_rows} rows in all messages; got {rows}")
        if self._first is None:
            self._first = head
            self._values = torch.empty(self._num_rows, *shape[1:], dtype=dtype)
            self._bytes = self._values.view(-1).view(torch.uint8).numpy()
        self._bytes[self._at : self._at + len(data)] = np.frombuffer(data, np.uint8)
        self._at, self._rows = self._at + len(data), rows
        self._scales.append(head.row_scales)

    def joined(self) -> Tensor:
        """Return the whole, in the dtype that travelled; of rows with scales, their values in fp32.

        Raises:
            ConfigError: it is not whole, or there is not a scale for each row.
        """
        values, what = self._values, self._what
        if self._first is None or self._rows != self._num_rows:
            raise ConfigError(f"{what} must be {self._num_rows} rows in all messages; got {self._rows}")
        if not self._first.row_scales:
            return values
        scales = b"".join(self._scales)
        if len(scales) != self._rows * _SCALE_BYTES or values.ndim != 2 or values.dtype not in _FP8:
            raise ConfigError(
                f"{what} in {values.dtype} must have one scale a row; got {len(scales)} bytes for {self._rows} rows"
            )
        return values.float() * torch.from_numpy(np.frombuffer(scales, np.float32).copy())[:, None]


def unpacked(tensors: Sequence[Frame | pb.Tensor], what: str) -> Tensor:
    """Return what tensors hold one after the other, joined along the first dimension, in new memory.

    Args:
        tensors: one at least, of one dtype, alike in all dimensions but the first.
        what: what errors call it.

    Returns:
        A tensor of the dtype that travelled; of rows with scales, their values in fp32.

    Raises:
        ConfigError: shape and bytes do not fit together, or the tensors not to each other.
        ConsistencyError: the bytes are not those that were sent.
    """
    frames = [each if isinstance(each, Frame) else frame_of(each) for each in tensors]
    for each in frames:  # before memory is asked for: a few bytes can claim any shape
        _check_shape(each.head, len(each.data or b""), frames[0].head, what)
    joining = Joining(sum(each.head.shape[0] for each in frames), what)
    for each in frames:
        joining.add(each)
    return joining.joined()


def _check_shape(head: pb.Tensor, num_bytes: int, first: pb.Tensor, what: str) -> None:
    shape, dtype = tuple(head.shape), dtype_of(head.dtype, f"{what}'s dtype")
    if not 1 <= len(shape) <= 2 or min(shape) < 0 or max(shape) >= _MAX_LENGTH:
        raise ConfigError(f"{what} must have one or two dimensions, each in [0, 2**31); got shape {list(shape)[:8]}")
    if head.dtype != first.dtype or shape[1:] != tuple(first.shape[1:]):
        raise ConfigError(
            f"{what} must be a tensor of one dtype and width in all messages; got {dtype_name(dtype)} {list(shape)} "
            f"after {dtype_name(dtype_of(first.dtype, what))} {list(first.shape)[:8]}"
        )
    if num_bytes != (size := dtype.itemsize * math.prod(shape)):
        raise ConfigError(f"{what} of shape {list(shape)} must be {size} bytes; got {num_bytes}")


def _check_sum(head: pb.Tensor, data: Bytes, what: str) -> None:
    if head.HasField("crc32c") and (found := crc32c(data)) != head.crc32c:
        raise ConsistencyError(
            f"{what} must arrive as it was sent; its checksum is {found:08x}, sent was {head.crc32c:08x}; send it again"
        )


def _bytes_of(tensor: Tensor) -> Bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def blocks(length: int, item_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Yield slices of `length` tokens or rows that fit a message; one at least, also of nothing."""
    step = max(1, block_bytes // max(1, item_bytes))
    for begin in range(0, max(1, length), step):
        yield slice(begin, min(length, begin + step))

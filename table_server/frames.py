"""Messages whose tensors lie beside them: protobuf's own bytes, without its copies of what is large.

The generated classes copy a field of bytes whenever it is set, read, parsed or serialised. A frame is the same message
as the same bytes on the wire; the data of its tensors are views of what was received, or of what is to be sent.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from mfdist.table_server.proto import table_v1_pb2 as pb

Bytes: TypeAlias = bytes | memoryview

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types, without groups
_DATA = pb.Tensor.DATA_FIELD_NUMBER
_NOTHING: Mapping[str, "Frame"] = {}


@dataclass(eq=False)
class Frame:
    """A message: all but its tensors as protobuf has it, and these beside it, by the names of their fields.

    Args:
        head: the message without them.
        parts: messages that are tensors or hold some.
        data: of a tensor, whose head then has none.
    """

    head: Any
    parts: Mapping[str, "Frame"] = field(default_factory=dict)
    data: Bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return len(self.data or b"") + sum(part.num_bytes for part in self.parts.values())

    def part(self, name: str) -> "Frame":
        """Return a part, an empty one if it is not there."""
        return self.parts.get(name) or Frame(_layout(self.head.DESCRIPTOR)[name][1]())

    def owning(self) -> "Frame":
        """Return the same message with copies of its data, which are safe from whoever changes the tensors."""
        parts = {name: part.owning() for name, part in self.parts.items()}
        return Frame(self.head, parts, None if self.data is None else bytes(self.data))

    def serialized(self) -> bytes:
        """Return the message's bytes, in which each tensor's are copied once."""
        return b"".join(self.pieces())

    def pieces(self) -> list[Bytes]:
        """Return what is to be joined to the message's bytes."""
        made: list[Bytes] = [self.head.SerializeToString()]
        for name, part in self.parts.items():
            made += _delimited(_layout(self.head.DESCRIPTOR)[name][0], part.pieces())
        if self.data:
            made += _delimited(_DATA, [self.data])
        return made


def reader(kind: type[Any]) -> Callable[[bytes], Frame]:
    """Return what reads messages of a generated class from bytes; they must stay as they are while the frame is used.

    It raises `DecodeError` where protobuf would.
    """
    return lambda data: _read(kind, memoryview(data))


def frame_of(message: pb.Tensor) -> Frame:
    """Return a tensor that is a message."""
    return Frame(message, _NOTHING, message.data)


def _read(kind: type[Any], view: memoryview) -> Frame:
    parts = _layout(kind.DESCRIPTOR)
    numbers = {number: name for name, (number, _) in parts.items()}
    rest: list[memoryview] = []
    found: dict[str, memoryview | bytes] = {}
    data: memoryview | None = None
    is_tensor, at, kept_from = kind is pb.Tensor, 0, 0
    try:
        while at < len(view):
            begin = at
            tag, at = _varint(view, at)
            number, wire = tag >> 3, tag & 7
            if wire == _LENGTH:
                size, at = _varint(view, at)
                content = view[at : at + size]
                at += size
                name = numbers.get(number)
                if name is not None:  # one that comes twice is merged, which is to join its bytes
                    found[name] = content if name not in found else b"".join((found[name], content))
                elif is_tensor and number == _DATA:
                    data = content
                else:
                    continue
                rest.append(view[kept_from:begin])
                kept_from = at
            elif wire == _VARINT:
                _, at = _varint(view, at)
            elif wire in (_FIXED32, _FIXED64):
                at += 4 if wire == _FIXED32 else 8
            else:
                raise IndexError
        if at > len(view):
            raise IndexError
    except IndexError:  # damaged, or a form that nobody sends; protobuf says which
        return _of_message(kind.FromString(bytes(view)))
    rest.append(view[kept_from:])
    read = {name: _read(parts[name][1], memoryview(content)) for name, content in found.items()}
    return Frame(kind.FromString(b"".join(rest)), read, data)


def _of_message(message: Any) -> Frame:
    """Return a message as a frame, the slow way."""
    if isinstance(message, pb.Tensor):
        return frame_of(message)
    parts = {}
    for name in _layout(message.DESCRIPTOR):
        if message.HasField(name):
            parts[name] = _of_message(getattr(message, name))
            message.ClearField(name)
    return Frame(message, parts)


@functools.cache
def _layout(descriptor: Descriptor) -> dict[str, tuple[int, type[Any]]]:
    """Return the number and the class of each field that is a tensor or holds some, by name."""
    return {
        each.name: (each.number, GetMessageClass(each.message_type))
        for each in descriptor.fields
        if each.type == FieldDescriptor.TYPE_MESSAGE
        and not each.is_repeated
        and each.message_type.name in ("Tensor", "Lookups")
    }


def _delimited(number: int, pieces: list[Bytes]) -> list[Bytes]:
    size = sum(len(piece) for piece in pieces)
    return [_encoded(number << 3 | _LENGTH) + _encoded(size), *pieces]


def _encoded(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Return a number and where the next field begins. Raises IndexError where it does not end."""
    number = view[at]
    if number < 0x80:
        return number, at + 1
    number &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = view[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at + 1
    raise IndexError

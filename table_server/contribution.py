"""Pushes and lookups as the messages of a stream, read back into tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.table_server.codec import unpacked
from mfdist.table_server.frames import Frame, reader
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.shard import Contribution, Lookups
from mfdist.table_server.updates import Push

_read = reader(pb.PushRequest)


def lookups_of(messages: Sequence[Frame], code_stride: int, first_slot: int) -> Lookups:
    """Return the lookups that messages hold one after the other.

    Raises:
        ConfigError: they do not fit together.
        ConsistencyError: bytes were damaged on the way.
    """
    row_ids = unpacked([message.part("row_ids") for message in messages], "row_ids")
    scores = unpacked([message.part("scores") for message in messages], "scores")
    if "tokens" not in messages[0].parts:
        return Lookups(row_ids, scores, code_stride=code_stride, first_slot=first_slot)
    tokens, before = [], 0
    for message in messages:
        part = unpacked([message.part("tokens")], "tokens")
        if part.dtype != torch.int32:
            raise ConfigError(f"tokens of listed lookups must be int32; got {part.dtype}")
        tokens.append(part + before)
        before += message.head.num_tokens
    return Lookups(row_ids, scores, torch.cat(tokens), before, code_stride, first_slot)


def push_of(messages: Sequence[Frame]) -> Push:
    """Return the push that messages are; the log's bytes are theirs, without epoch and session.

    Those change where a push is sent again, and it is still the same.

    Raises:
        ConfigError: they do not fit together.
        ConsistencyError: bytes were damaged on the way.
    """
    first = messages[0].head
    first.ClearField("epoch")
    first.ClearField("session")
    payload = [message.serialized() for message in messages]
    return Push(first.client, first.step, first.lr, contribution_of(messages), payload)


def parsed_push(messages: Sequence[bytes]) -> Push:
    """Return the push that serialised messages are, as they were logged."""
    return push_of([_read(message) for message in messages])


def contribution_of(messages: Sequence[Frame]) -> Contribution | None:
    """Return what a push contributes: lookups, gradients of rows as lookups of them with score 1, or nothing."""
    first = messages[0]
    if "lookups" in first.parts:
        head = first.head
        lookups = lookups_of([message.part("lookups") for message in messages], head.code_stride, head.first_slot)
        return Contribution(lookups, unpacked([message.part("grad_output") for message in messages], "grad_output"))
    if "row_gradients" in first.parts:
        row_ids = unpacked([message.part("row_ids") for message in messages], "row_ids")
        gradients = unpacked([message.part("row_gradients") for message in messages], "row_gradients")
        if gradients.ndim != 2 or row_ids.shape != gradients.shape[:1] or row_ids.dtype != torch.int64:
            raise ConfigError(
                f"gradients of rows need row_ids [U] int64 and row_gradients [U, D]; got {list(row_ids.shape)} "
                f"{row_ids.dtype} and {list(gradients.shape)}"
            )
        if len(row_ids) > 1 and not bool((row_ids[1:] > row_ids[:-1]).all()):
            raise ConfigError("gradients of rows must be of each row once, rising; got ids that are not")
        return Contribution(_one_each(row_ids), gradients)
    return None


def _one_each(row_ids: Tensor) -> Lookups:
    number = len(row_ids)
    return Lookups(row_ids, torch.ones(number), torch.arange(number, dtype=torch.int32), number)

"""Pushes and lookups as the messages of a stream, read back into tensors."""

import math
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

#: What the messages of a push hold: the tensors of one form, and none of the other's.
_FORMS = (("lookups", "grad_output"), ("row_ids", "row_gradients"))


def lookups_of(messages: Sequence[Frame], code_stride: int, first_slot: int) -> Lookups:
    """Return the lookups that messages hold one after the other.

    Raises:
        ConfigError: they do not fit together, or tokens of listed ones fall or are none of their message's.
        ConsistencyError: bytes were damaged on the way.
    """
    lookups = _joined_lookups(messages, code_stride, first_slot)
    _check_tokens(lookups, messages)
    return lookups


def push_of(messages: Sequence[Frame]) -> Push:
    """Return the push that messages are; the log's bytes are theirs, without epoch and session.

    Those change where a push is sent again, and it is still the same.

    Raises:
        ConfigError: a number is out of range, or what they hold is no contribution.
        ConsistencyError: bytes were damaged on the way.
    """
    _check_numbers(messages[0].head)
    return _push(messages, contribution_of(messages))


def step_of(request: pb.StepRequest) -> Push:
    """Return the push that contributes nothing, by which a client takes part in a step.

    Raises:
        ConfigError: a number is out of range.
    """
    _check_numbers(request)
    message = pb.PushRequest(table=request.table, client=request.client, step=request.step, lr=request.lr)
    return _push([Frame(message)], None)


def logged_push(messages: Sequence[bytes]) -> Push:
    """Return the push that serialised messages are, as they were logged: what was acknowledged is not refused later."""
    frames = [_read(message) for message in messages]
    return _push(frames, _joined_contribution(frames))


def contribution_of(messages: Sequence[Frame]) -> Contribution:
    """Return what a push contributes: lookups, or gradients of rows as lookups of them with score 1.

    Raises:
        ConfigError: the messages do not all hold one whole form of it, or do not fit together.
        ConsistencyError: bytes were damaged on the way.
    """
    _check_form(messages)
    contribution = _joined_contribution(messages)
    assert contribution is not None, "the messages have a form"
    if "lookups" in messages[0].parts:
        _check_tokens(contribution.lookups, [message.part("lookups") for message in messages])
    return contribution


def _push(messages: Sequence[Frame], contribution: Contribution | None) -> Push:
    first = messages[0].head
    first.ClearField("epoch")
    first.ClearField("session")
    payload = [message.serialized() for message in messages]
    return Push(first.client, first.step, first.lr, contribution, payload)


def _check_numbers(head: pb.PushRequest | pb.StepRequest) -> None:
    where = f'client {head.client} for table "{head.table}"'
    if not 0 <= head.lr < math.inf:
        raise ConfigError(f"lr must be finite and 0 or more; got {head.lr} of {where}; send the rate of the step")
    if not head.step:
        raise ConfigError(f"steps count from 1; got 0 of {where}; go on from the steps that Join returns")


def _check_form(messages: Sequence[Frame]) -> None:
    def held_by(message: Frame) -> tuple[str, ...]:
        return tuple(name for form in _FORMS for name in form if name in message.parts)

    first = held_by(messages[0])
    for number, message in enumerate(messages):
        held = held_by(message)
        if held not in _FORMS:
            raise ConfigError(
                "a push must hold either lookups and grad_output or row_ids and row_gradients in each message; got "
                f"{' and '.join(held) or 'none of them'} in message {number}; send one whole form, or Step for none"
            )
        if held != first:
            raise ConfigError(
                f"all messages of a push must hold the same; got {' and '.join(held)} in message {number} after "
                f"{' and '.join(first)}; push one form in each step"
            )


def _check_tokens(lookups: Lookups, messages: Sequence[Frame]) -> None:
    """Raise unless tokens of listed lookups rise, and are those of the message that holds them."""
    tokens = lookups.tokens
    if tokens is None:
        if any("tokens" in message.parts for message in messages):
            raise ConfigError("lookups must be listed in all messages or in none; got tokens after a message without")
        return
    if bool((tokens[1:] < tokens[:-1]).any()):
        raise ConfigError("tokens of listed lookups must rise; got some that fall; list lookups token by token")
    at = before = 0
    for message in messages if len(messages) > 1 else ():  # those of one are in range as they are
        end, after = at + message.part("tokens").head.shape[0], before + message.head.num_tokens
        if end > at and not before <= int(tokens[at]) <= int(tokens[end - 1]) < after:
            raise ConfigError(
                f"tokens must lie in [0, {message.head.num_tokens}), counted from their message's first; got "
                f"{int(tokens[end - 1]) - before}"
            )
        at, before = end, after


def _joined_lookups(messages: Sequence[Frame], code_stride: int, first_slot: int) -> Lookups:
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


def _joined_contribution(messages: Sequence[Frame]) -> Contribution | None:
    first = messages[0]
    if "lookups" in first.parts:
        head = first.head
        lookups = _joined_lookups([message.part("lookups") for message in messages], head.code_stride, head.first_slot)
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

"""What all ranks must have alike before they exchange anything else."""

import hashlib
import itertools

import torch

from mfdist.errors import ConfigError
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.tags import Call


def agree(exchange: Exchange, what: str, text: str) -> None:
    """Raise unless all ranks give the same text.

    Args:
        exchange: among the ranks.
        what: the text is, as the error names it.
        text: compared by its digest; sent only where they differ, to show how.

    Raises:
        ConfigError: a rank has another one; the message shows the first line that differs.

    Called on: all ranks of the exchange.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
    words = [int.from_bytes(digest[start : start + 7], "little") for start in range(0, 28, 7)]
    call = Call(table="", kind=what, phase="check")
    everyones = [line[:4] for line in exchange.open(call, words).wait()]
    if all(theirs == words for theirs in everyones):
        return
    payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    opened = exchange.open(call, [payload.numel()])
    sizes = [line[0] for line in opened.wait()]
    sent = [payload.numel()] * exchange.world_size
    arrived = exchange.send(opened, payload.repeat(exchange.world_size), sent, sizes, max(sizes)).wait()
    texts = arrived.split_with_sizes(sizes)
    rank = next(rank for rank, theirs in enumerate(everyones) if theirs != words)
    theirs, own = (bytes(part.tolist()).decode().splitlines() for part in (texts[rank], payload))
    pairs = itertools.zip_longest(own, theirs, fillvalue="nothing")
    here, there = next(((one, other) for one, other in pairs if one != other), ("", ""))
    raise ConfigError(
        f"all ranks must have the same {what}; got {here.strip()!r} on rank {exchange.ranks[exchange.rank]} and "
        f"{there.strip()!r} on rank {exchange.ranks[rank]}; start all ranks with one configuration"
    )

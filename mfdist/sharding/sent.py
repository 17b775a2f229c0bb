"""What a rank has sent to others through one exchange."""

from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sent:
    """One message as `Exchange.send` was asked for it: elements for each rank, from each rank, and at most.

    Where `is_lent` it was `Exchange.lend` that was asked, and the message went by mailboxes; where `has_own` it was
    given what stays on this rank, so that `write` was not called for it.
    """

    dtype: torch.dtype
    sizes: list[int]
    arriving: list[int]
    largest: int
    is_lent: bool = False
    has_own: bool = False


@dataclass(kw_only=True)
class Traffic:
    """What this rank has sent to others through one exchange."""

    num_bytes: Counter[str] = field(default_factory=Counter)  # phase → payload bytes
    control_bytes: int = 0  # tags and sizes
    num_messages: int = 0  # payload messages, a piece each
    sends: list[Sent] | None = None  # every one, where a list is put here to be filled

    def clear(self) -> None:
        """Start counting anew."""
        self.num_bytes.clear()
        self.control_bytes = self.num_messages = 0

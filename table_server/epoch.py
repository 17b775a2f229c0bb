"""Epochs: ordered numbers, of which two servers of a pair never take the same one.

From the high bits down: how often a replica has taken over, who did last, and how often the epoch grew since. A server
without a peer has none of the former, and counts 1, 2, 3. All fit into a double, for whoever looks on.
"""

_COUNT_BITS = 21
_WHO_BITS = 16  # and 16 are left to the term

FIRST = 1


def who(server_id: str) -> int:
    """Return what stands for a server in its epochs; those of a pair must differ in it."""
    return int(server_id[: _WHO_BITS // 4], 16)


def is_id(server_id: str) -> bool:
    """Return whether this can be a server's id."""
    return len(server_id) == 16 and all(digit in "0123456789abcdef" for digit in server_id)


def after(epoch: int) -> int:
    """Return the next epoch of the same server in the same role."""
    return epoch + 1


def taken_over(epoch: int, server_id: str) -> int:
    """Return the first epoch of a server that becomes the primary, above all that any server took before.

    Args:
        epoch: the highest that is known.
        server_id: whose; see `who`.
    """
    return ((((term_of(epoch) + 1) << _WHO_BITS) | who(server_id)) << _COUNT_BITS) + FIRST


def term_of(epoch: int) -> int:
    """Return how often a replica had taken over."""
    return epoch >> (_WHO_BITS + _COUNT_BITS)


def text(epoch: int) -> str:
    """Return an epoch as people read it: the term, the count within it, and how the primary's id begins."""
    term, count = term_of(epoch), epoch & ((1 << _COUNT_BITS) - 1)
    mine = (epoch >> _COUNT_BITS) & ((1 << _WHO_BITS) - 1)
    return f"{term}.{count} of {mine:04x}" if term else str(count)

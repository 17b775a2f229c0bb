"""How a job stands, as its supervisor sees it: its servers, its group of trainers, and its patience."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mfdist.launch.happenings import Ended


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How patient a supervisor is; [launch] in the configuration, or its elastic, has the same names."""

    silence_s: float = 20.0
    stall_s: float = 1800.0
    start_s: float = 300.0
    replace_s: float = 60.0
    grow_s: float = 60.0
    stop_s: float = 120.0
    max_failures: int = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def pause_s(self, count: int) -> float:
        """Return the pause after so many failures in a row: none after the first, then one that doubles."""
        return 0.0 if count <= 1 else min(self.backoff_s * 2.0 ** (count - 2), self.max_backoff_s)


@dataclass
class Server:
    """One table server's slot; its incarnation counts its starts."""

    phase: Literal["absent", "starting", "up", "stopping"] = "absent"
    incarnation: int = 0
    since: float = 0.0
    heard: float = 0.0
    address: str = ""
    host: str = ""
    not_before: float = 0.0  # for it alone, while the other one of its pair goes on
    num_failures: int = 0  # of that kind, since the last commit


def are_serving(servers: Sequence[Server], replicas: int) -> bool:
    """Return whether trainers reach all rows: a server of each pair is up, and all have been.

    Args:
        servers: with two replicas, of one pair after the other.
        replicas: 1 where each server is by itself.
    """
    pairs = [servers[first : first + replicas] for first in range(0, len(servers), replicas)]
    has_been_up = all(server.address for server in servers)
    return has_been_up and all(any(server.phase == "up" for server in pair) for pair in pairs)


@dataclass
class Group:
    """The trainers that train together."""

    generation: int
    size: int
    since: float
    phase: Literal["placing", "training", "stopping", "failing", "finishing"] = "placing"
    addresses: tuple[str, ...] = ()  # of the servers it was given
    heard: dict[int, float] = field(default_factory=dict)
    hosts: dict[int, str] = field(default_factory=dict)
    moved: float = 0.0  # when it last told of anything
    ended: dict[int, Ended] = field(default_factory=dict)

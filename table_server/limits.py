"""How much one client may ask for, how often a wrong token is looked at, and how often a refusal is logged.

Rates are token buckets, refilled as time passes: a burst may take what two seconds bring.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from mfdist.table_server.sections import LimitsConfig

_MIB = 2**20
_BURST_S = 2.0
_MAX_KEYS = 4096  # those not seen for longest are forgotten: names come from outside


class Bucket:
    """`rate` units a second, up to `capacity` saved. Not for several threads.

    Args:
        rate: units a second; 0: no limit.
        capacity: units that may be taken at once; it begins full.
        clock: seconds on a clock that never goes back.
    """

    __slots__ = ("_capacity", "_clock", "_level", "_rate", "_seen")

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._capacity, self._clock = rate, capacity, clock
        self._level, self._seen = capacity, clock()

    def take(self, amount: float = 1.0) -> float:
        """Take `amount` and return 0; or take nothing and return the seconds until there is enough."""
        wait_s = self.wait_s(amount)
        if not wait_s:
            self.charge(amount)
        return wait_s

    def wait_s(self, amount: float = 0.0) -> float:
        """Return the seconds until `amount` can be taken, or until a debt is paid; 0 where that is now."""
        if not self._rate:
            return 0.0
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._seen) * self._rate)
        self._seen = now
        return max(0.0, (amount - self._level) / self._rate)

    def charge(self, amount: float) -> None:
        """Take `amount` whether it is there or not: what has been moved already can only be counted."""
        if self._rate:
            self._level -= amount


class Buckets:
    """A bucket for each key, for the keys seen last."""

    def __init__(self, make: Callable[[], Bucket]) -> None:
        self._make = make
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __getitem__(self, key: str) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = self._make()
            if len(self._buckets) > _MAX_KEYS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket


class ClientLimits:
    """The limits of every client. Called in the event loop alone."""

    def __init__(self, config: LimitsConfig) -> None:
        self.max_message_bytes = int(config.max_message_mib * _MIB)
        self.max_request_bytes = int(config.max_request_mib * _MIB)
        self.max_in_flight = config.max_requests_in_flight
        requests, num_bytes = config.requests_per_s, config.mib_per_s * _MIB
        self.requests = Buckets(lambda: Bucket(requests, max(1.0, requests * _BURST_S)))
        self.bytes = Buckets(lambda: Bucket(num_bytes, num_bytes * _BURST_S))
        self._in_flight: dict[str, int] = {}

    def enter(self, client: str) -> bool:
        """Count one more request in flight and return True; or return False where the client has as many as it may."""
        now = self._in_flight.get(client, 0)
        if now >= self.max_in_flight:
            return False
        self._in_flight[client] = now + 1
        return True

    def leave(self, client: str) -> None:
        """Count one less."""
        left = self._in_flight[client] - 1
        if left:
            self._in_flight[client] = left
        else:
            del self._in_flight[client]


class Sieve:
    """Lets so many of one kind a minute through, and counts what it holds back."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets = Buckets(lambda: Bucket(per_minute / 60.0, per_minute, clock))
        self._held: OrderedDict[str, int] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Return the seconds until one more of this kind would pass; 0 where it would now."""
        return self._buckets[key].wait_s(1.0)

    def passes(self, key: str) -> tuple[bool, int]:
        """Return whether this one passes, and how many were held back since the last that did."""
        if not self._buckets[key].take():
            return True, self._held.pop(key, 0)
        self._held[key] = self._held.get(key, 0) + 1
        if len(self._held) > _MAX_KEYS:
            self._held.popitem(last=False)
        return False, 0

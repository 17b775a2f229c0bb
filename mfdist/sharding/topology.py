"""Topologies: the ranks a plan is for, their memory, and how fast bytes move. Pure values; JSON in and out.

Rates are what one rank gets in practice, not what a data sheet says. `h100` and `cpu` are starting points;
`mfdist bench plan --save FILE` measures a machine's own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Self

from mfdist.errors import ConfigError

#: Share of a rank's memory that tables, states, buffers and the rest of the model may fill together; the rest is left
#: to the device's own libraries and to what the allocator cannot use.
USABLE_SHARE = 0.9

_MAY_BE_ZERO = (
    "host_memory_bytes",
    "collective_s",
    "host_lookup_s",
    "row_start_s",
    "fresh_bytes_per_s",
    "inside.latency_s",
    "between.latency_s",
    "control.latency_s",
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """The α and β of one kind of connection.

    Args:
        bytes_per_s: what one rank sends, and receives at the same time.
        latency_s: a message to one peer; between accelerators, one that was queued long before.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Equal ranks, spread evenly over equal hosts; rank = host · ranks_per_host + place on the host.

    Args:
        name: shown in reports.
        world_size, num_hosts: ranks in all, and hosts; each host has the same number of ranks.
        memory_bytes: of a rank: a GPU's, or a share of the host's where ranks are processes.
        host_memory_bytes: of a host, beside its ranks'; 0 where it is not to be counted on.
        inside, between: links to ranks of the same host, and of others.
        collective_s: what a collective takes before anything moves; where ranks are accelerators, of their hosts.
        host_lookup_s: what the host takes to set a table's lookup, backward and update going, beside collectives, while
            an accelerator works; 0 where the ranks' own processors do all.
        control: the link that tags and sizes take, from host to host even where ranks are accelerators.
        copy_bytes_per_s: large copies in a rank's memory, read and written bytes together.
        fresh_bytes_per_s: of buffers too large for the allocator to keep, besides, each time one is made; 0 where it
            keeps all, as on GPUs.
        lookup_bytes_per_s: rows a lookup reads from memory.
        cached_lookup_bytes_per_s: the same, where a slice of the table stays in the cache.
        row_start_s: what reading a row takes besides, however wide it is; 0 where that was not measured apart.
        cache_bytes: table slices up to this size stay in the cache.
        sort_ids_per_s: row ids sorted or deduplicated.
        pass_rows_per_s: rows that a gradient of all rows passes over, whatever their width.
        flops_per_s: of the dense part, reached and not nominal.

    Raises:
        ConfigError: hosts do not divide the ranks, or a figure is not positive; the message names it.
    """

    name: str
    world_size: int
    num_hosts: int = 1
    memory_bytes: int
    host_memory_bytes: int = 0
    inside: Link
    between: Link
    collective_s: float
    control: Link
    copy_bytes_per_s: float
    fresh_bytes_per_s: float
    lookup_bytes_per_s: float
    cached_lookup_bytes_per_s: float
    cache_bytes: int
    sort_ids_per_s: float
    pass_rows_per_s: float
    flops_per_s: float
    host_lookup_s: float = 0.0
    row_start_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in _figures(asdict(self)):
            may_be_zero = name in _MAY_BE_ZERO
            if not (value > 0 or (may_be_zero and value == 0)) or not math.isfinite(value):
                raise ConfigError(f"a topology's figures must be positive; got {name}={value} in {self.name}")
        if self.world_size % self.num_hosts:
            raise ConfigError(
                f"each host must have the same number of ranks; got {self.world_size} ranks on {self.num_hosts} hosts"
            )

    @property
    def ranks_per_host(self) -> int:
        """Return how many ranks share a host."""
        return self.world_size // self.num_hosts

    @property
    def usable_bytes(self) -> int:
        """Return what a rank's tables and everything beside them may fill."""
        return int(self.memory_bytes * USABLE_SHARE)

    def resized(self, world_size: int) -> "Topology":
        """Return the same machines with another number of ranks; full hosts, or one that is not full.

        Raises:
            ConfigError: the ranks do not fill hosts of this one's size.
        """
        ranks = min(world_size, self.ranks_per_host)
        if ranks < 1 or world_size % ranks:
            raise ConfigError(
                f"ranks must fill hosts of {self.ranks_per_host}; got {world_size}; give a multiple of it"
            )
        return replace(self, world_size=world_size, num_hosts=world_size // ranks)

    def to_json(self) -> str:
        """Return the topology as a JSON document."""
        return json.dumps({"format": "mfdist-topology", "version": 1, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json`, a calibration or a person wrote.

        Raises:
            ConfigError: it is no topology, or a key is missing, unknown or of the wrong type.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"a topology must be JSON; {error}") from None
        if not isinstance(document, dict) or document.pop("format", None) != "mfdist-topology":
            raise ConfigError(
                'a topology must be a JSON object with "format": "mfdist-topology"; this is something else'
            )
        if (version := document.pop("version", None)) != 1:
            raise ConfigError(f"this mfdist reads version 1 of topologies; got {version}")
        links = {name: Link(**_checked(document.get(name), Link, name)) for name in _LINKS}
        return cls(**{**_checked(document, cls, "the topology"), **links})


def h100(world_size: int, num_hosts: int = 1, *, memory_bytes: int = 80_000_000_000) -> Topology:
    """Return GPUs of the H100 kind, NVLink within a host, one 400 Gb/s InfiniBand port a GPU between hosts.

    Rates of memory and lookups were measured on one of them; links within a host and the host's times on four H200 of a
    virtual machine; see docs/results. Between hosts it is 90 % of what is nominal, and not measured.
    """
    return Topology(
        name="h100",
        world_size=world_size,
        num_hosts=num_hosts,
        memory_bytes=memory_bytes,
        inside=Link(bytes_per_s=337e9, latency_s=9e-6),
        between=Link(bytes_per_s=45e9, latency_s=15e-6),
        collective_s=0.22e-3,
        host_lookup_s=1.44e-3,
        control=Link(bytes_per_s=5e9, latency_s=12e-6),
        copy_bytes_per_s=2.97e12,
        fresh_bytes_per_s=0.0,
        lookup_bytes_per_s=2.9e12,
        cached_lookup_bytes_per_s=9e12,
        cache_bytes=25_000_000,
        sort_ids_per_s=10e9,
        pass_rows_per_s=1e9,
        flops_per_s=3e14,
    )


def cpu(world_size: int, num_hosts: int = 1, *, memory_bytes: int = 8 << 30) -> Topology:
    """Return processes of one core that share memory, and speak gloo over 10 Gb/s Ethernet between hosts.

    Rates are those of a 2-core virtual machine with AVX-512, in processor time; those between hosts were not measured.
    """
    return Topology(
        name="cpu",
        world_size=world_size,
        num_hosts=num_hosts,
        memory_bytes=memory_bytes,
        inside=Link(bytes_per_s=6e9, latency_s=0.03e-3),
        between=Link(bytes_per_s=1.1e9, latency_s=0.2e-3),
        collective_s=0.12e-3 if num_hosts == 1 else 0.25e-3,
        control=Link(bytes_per_s=1.1e9, latency_s=0.02e-3 if num_hosts == 1 else 0.1e-3),
        copy_bytes_per_s=20e9,
        fresh_bytes_per_s=2.4e9,
        lookup_bytes_per_s=7e9,
        cached_lookup_bytes_per_s=15e9,
        row_start_s=10e-9,
        cache_bytes=32 << 20,
        sort_ids_per_s=60e6,
        pass_rows_per_s=15e6,
        flops_per_s=5e10,
    )


#: Name → the topology it stands for, given ranks and hosts.
TOPOLOGIES = {"h100": h100, "cpu": cpu}


_LINKS = ("inside", "between", "control")
_JSON_TYPES: dict[Any, Any] = {int: int, float: (int, float), str: str}


def _figures(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _figures(value, f"{prefix}{name}.")
        elif not isinstance(value, str):
            found.append((prefix + name, value))
    return found


def _checked(values: Any, kind: type[Any], where: str) -> dict[str, Any]:
    """Return `values` if they are the fields of the dataclass `kind`, numbers where it has numbers."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a JSON object; got {values!r}")
    known = {field.name: field.type for field in fields(kind)}
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f'unknown key "{unknown[0]}" in {where}; keys are {", ".join(known)}')
    required = [field.name for field in fields(kind) if field.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f'key "{missing[0]}" is missing in {where}')
    for name, value in values.items():
        allowed = _JSON_TYPES.get(known[name], object)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ConfigError(f"{name} has the wrong type in {where}; got {value!r}")
    return values

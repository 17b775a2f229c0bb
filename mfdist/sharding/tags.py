"""Tags: what a rank says it is doing whenever ranks tell each other sizes. Pure values.

Ranks that do different things would otherwise wait for each other for ever, or sum up rows of two tables. Every
exchange of sizes carries the sender's tag; a tag that differs from one's own is an error that names both calls.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from mfdist.errors import ConsistencyError

PHASES: Final = ("lookup", "gradient", "update", "check")
#: Integers of a tag on the wire.
TAG_SIZE: Final = 8


@dataclass(frozen=True, kw_only=True)
class Call:
    """One lookup or gradient of one table, as every rank must make it.

    Args:
        table: the table's name.
        kind: of sharding; one that is spelled differently is another kind.
        phase: one of `PHASES`.
        num_lookups: K, where it must be the same on all ranks.
        code_stride: see `Table.forward`.
        id_bytes: of a row id or code, as they travel.
        values: dtype of the sums that are asked for, which autocast may make narrower.
    """

    table: str
    kind: str
    phase: str
    num_lookups: int = 0
    code_stride: int = 0
    id_bytes: int = 0
    values: str = ""

    def encode(self, number: int) -> list[int]:
        """Return the tag of this call, the `number`-th of its exchange, as `TAG_SIZE` integers below 2^63."""
        names = (name_code(self.table), name_code(self.kind), PHASES.index(self.phase))
        return [number, *names, self.num_lookups, self.code_stride, self.id_bytes, name_code(self.values)]

    def told(self, number: int) -> str:
        """Return the call as messages name it."""
        sizes = (self.num_lookups, self.code_stride, self.id_bytes)
        return _told(number, f'"{self.table}"', self.kind, self.phase, *sizes, self.values)


@cache
def name_code(name: str) -> int:
    """Return a number that stands for a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def check_tags(call: Call, number: int, tags: Mapping[int, Sequence[int]], own_rank: int, names: Sequence[str]) -> None:
    """Raise ConsistencyError where another rank's tag is not this call's.

    Args:
        call: what this rank does.
        number: its number.
        tags: rank → the tag it sent.
        own_rank: this rank.
        names: of tables and kinds, to translate what others sent.
    """
    own = call.encode(number)
    for rank, tag in tags.items():
        if list(tag) != own:
            known = {name_code(name): name for name in names}
            table = f'"{known[tag[1]]}"' if tag[1] in known else "this rank does not know"
            kind = known.get(tag[2], "an unknown kind")
            values = _DTYPES.get(tag[7], "an unknown dtype")
            num_lookups, code_stride, id_bytes = tag[4:7]
            phase = PHASES[tag[3] % len(PHASES)]
            theirs = _told(tag[0], table, kind, phase, num_lookups, code_stride, id_bytes, values)
            raise ConsistencyError(
                f"all ranks must make the same lookups in the same order; rank {own_rank} makes {call.told(number)}, "
                f"rank {rank} makes {theirs}; look for what in the model depends on the rank or its data"
            )


_DTYPES = {name_code(name): name for name in ("", "float16", "bfloat16", "float32", "float64")}


def _told(
    number: int, table: str, kind: str, phase: str, num_lookups: int, code_stride: int, id_bytes: int, values: str
) -> str:
    sizes = f"K={num_lookups}, code_stride={code_stride}, ids of {id_bytes} bytes"
    sizes += f", {values}" if values else ""
    return f"call {number}, the {phase} of table {table} ({kind}, {sizes})"

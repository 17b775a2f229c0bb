"""Plans: which rank holds which part of each table. Pure values; JSON in and out.

A plan that exists is consistent in itself, see `TablePlan`; `ShardingPlan.validate` compares it with a model and a
mesh. `mfdist.sharding.kinds` makes the plans of single tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from mfdist.errors import ConfigError
from mfdist.sharding.table_plan import TablePlan, dtype_name
from mfdist.spec import TableSpec


@dataclass(frozen=True)
class ShardingPlan:
    """How the tables of a model are split over `world_size` ranks.

    Raises:
        ConfigError: two plans for one table, or an owner outside the world.
    """

    world_size: int
    tables: tuple[TablePlan, ...]

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigError(f"a plan needs at least one rank; got world_size={self.world_size}")
        if len(self._by_name) != len(self.tables):
            twice = next(plan.name for plan in self.tables if self._by_name[plan.name] is not plan)
            raise ConfigError(f'a plan must name each table once; "{twice}" is there twice')
        for plan in self.tables:
            if plan.owners and max(plan.owners) >= self.world_size:
                raise ConfigError(
                    f"owners must be ranks in [0, {self.world_size}); got {max(plan.owners)} for table "
                    f'"{plan.name}"; make a plan for this world size'
                )

    def table(self, name: str) -> TablePlan:
        """Return the plan of the table `name`.

        Raises:
            ConfigError: the plan does not know it.
        """
        if name not in self._by_name:
            raise ConfigError(f'the plan has no table "{name}"; it has {_some(self._by_name)}')
        return self._by_name[name]

    def validate(self, specs: Iterable[TableSpec], world_size: int) -> None:
        """Compare the plan with a model's tables and the size of a mesh.

        Raises:
            ConfigError: it is for another world size, lacks a table, has one that the model has not, or has another
                shape or dtype of it; the message shows both sides.
        """
        if self.world_size != world_size:
            raise ConfigError(
                f"a plan must be for the mesh it is used on; it is for {self.world_size} ranks, the mesh has "
                f"{world_size}; plan again for {world_size}"
            )
        expected = {spec.name: spec for spec in specs}
        if missing := [name for name in expected if name not in self._by_name]:
            raise ConfigError(f"a plan must cover every table of the model; it lacks {_some(missing)}; plan again")
        if unknown := [name for name in self._by_name if name not in expected]:
            raise ConfigError(
                f"a plan must be for this model; it has {_some(unknown)}, the model has {_some(expected)}; plan again"
            )
        for name, spec in expected.items():
            planned = self._by_name[name].spec
            if planned != spec:
                raise ConfigError(
                    f'a plan must have the model\'s shapes; table "{name}" is {_shape(planned)} in the plan, '
                    f"{_shape(spec)} in the model; plan again"
                )

    def to_json(self) -> str:
        """Return the plan as a JSON document; see `plan_json`."""
        from mfdist.sharding.plan_json import plan_to_json

        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` or a person wrote.

        Raises:
            ConfigError: it is not JSON, of another version, or inconsistent; the message names table and key.
        """
        from mfdist.sharding.plan_json import plan_from_json

        return cls(*plan_from_json(text))

    @cached_property
    def _by_name(self) -> dict[str, TablePlan]:
        return {plan.name: plan for plan in self.tables}


def _shape(spec: TableSpec) -> str:
    return f"{spec.num_rows} × {spec.row_dim} {dtype_name(spec.dtype)}"


def _some(names: Iterable[str]) -> str:
    listed = [f'"{name}"' for name in names]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more if listed else "no table"

"""What each rank holds of a table. Thousands of ranks hold few different amounts, and who holds alike costs alike."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from mfdist.sharding.cuts import Cuts
from mfdist.sharding.table_plan import TablePlan

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """The ranks of a world in C classes, each of the ranks that hold the same number of rows and of columns.

    Args:
        rows, columns: [C] of the region that each rank of a class holds; both 0 where it owns no part.
        counts: [C] ranks of each class.
        plan, world_size: what they come from.
    """

    rows: Floats
    columns: Floats
    counts: Floats
    plan: TablePlan
    world_size: int

    @classmethod
    def of(cls, plan: TablePlan, world_size: int) -> "Holdings":
        """Return what a plan gives to each rank."""
        classes = [
            (row, column, row_count * column_count)
            for row, row_count in zip(*_sizes(plan.row_cuts), strict=True)
            for column, column_count in zip(*_sizes(plan.column_cuts), strict=True)
        ]
        if plan.kind == "replicated":
            classes = [(row, column, world_size) for row, column, _ in classes]
        if num_idle := world_size - sum(count for _, _, count in classes):
            classes.append((0, 0, num_idle))
        rows, columns, counts = np.array(classes, dtype=np.float64).T
        return cls(rows=rows, columns=columns, counts=counts, plan=plan, world_size=world_size)

    def on_ranks(self, values: Floats) -> Floats:
        """Return values of classes [C] as values of ranks [W]."""
        return np.asarray(values[self._class_of])

    def mean(self, values: Floats) -> float:
        """Return the mean over all ranks of values of classes [C]."""
        return float(values @ self.counts) / self.world_size

    @cached_property
    def _class_of(self) -> npt.NDArray[np.int64]:
        plan = self.plan
        if len(self.rows) == 1:
            return np.zeros(self.world_size, dtype=np.int64)
        held = np.zeros((self.world_size, 2))
        parts = np.stack(
            [
                np.repeat(np.diff(plan.row_cuts), plan.num_column_parts),
                np.tile(np.diff(plan.column_cuts), plan.num_row_parts),
            ],
            axis=1,
        )
        held[np.asarray(plan.owners)] = parts
        classes = np.stack([self.rows, self.columns], axis=1)
        return np.asarray((held[:, None, :] == classes).all(2).argmax(1))


@lru_cache(maxsize=256)
def _sizes(cuts: Cuts) -> tuple[list[int], list[int]]:
    """Return the different sizes of parts, and how many parts have each."""
    sizes, counts = np.unique(np.diff(cuts), return_counts=True)
    return sizes.tolist(), counts.tolist()

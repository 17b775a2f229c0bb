"""Where a run's tables lie when it is not in the ranks: what the loop asks of that place."""

from typing import Protocol

from mfdist.models import Transformer
from mfdist.training.run import RunDirectory
from mfdist.training.world import World


class TableHome(Protocol):
    """A place outside the ranks that holds and trains rows, such as table servers; given to `train`.

    Every method is called on all ranks, in the same order.
    """

    def move_in(self, model: Transformer, world: World, *, is_loaded_next: bool) -> None:
        """Replace the model's tables, in place, by ones whose rows lie there; they are on the meta device.

        Args:
            model: whose.
            world: of the ranks.
            is_loaded_next: whether `load` follows, so that what an earlier world left half done there does not count.
        """

    def check_new(self) -> None:
        """Raise ConsistencyError where a run that begins anew would go on with rows that were trained before."""

    def save(self, run: RunDirectory, step: int, world: World) -> None:
        """Save all rows as step `step` of the run's `served_tables`; committed when it returns."""

    def load(self, run: RunDirectory, step: int, world: World) -> None:
        """Go on from the rows that `save` saved."""

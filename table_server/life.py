"""A shard from its making, or its last loading, on: what the protocol calls a history."""

from dataclasses import dataclass

from mfdist.table_server.shard import Shard
from mfdist.table_server.store import Held
from mfdist.table_server.updates import Updates


@dataclass
class Life:
    """A shard with its updates, under the name that its pushes are logged by."""

    name: str
    updates: Updates
    since: int  # updates before it began
    base: int | None = None  # its version in the last checkpoint; its log begins there, or at its first rows
    is_as_drawn: bool = False  # no update, and nothing written
    is_unsaved: bool = False  # something was written that no checkpoint has
    edit: str = ""  # names what was last written

    @property
    def shard(self) -> Shard:
        """Return the shard."""
        return self.updates.shard

    @property
    def held(self) -> Held:
        """Return what a checkpoint has of it."""
        return Held(self.shard, self.name, dict(self.updates.steps), dict(self.updates.kept), self.edit)

"""What happens to a job and what is done about it: the plain values between a supervisor's decisions and its hands."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["trainer", "server"]


@dataclass(frozen=True)
class ServerUp:
    """A table server takes calls."""

    index: int
    incarnation: int
    address: str
    host: str


@dataclass(frozen=True)
class GroupStarted:
    """All trainers of a group are there and begin to train."""

    generation: int
    hosts: tuple[str, ...]  # by rank


@dataclass(frozen=True)
class GroupNotPlaced:
    """The cluster has no place for a group."""

    generation: int
    cause: str


@dataclass(frozen=True)
class Beat:
    """An actor is alive; a trainer's incarnation is its group's generation."""

    kind: Kind
    index: int
    incarnation: int
    is_moving: bool = False  # it told of something since the last one
    committed: int = 0  # the last step that it knows to be committed


@dataclass(frozen=True)
class Ended:
    """An actor is no more: it finished, was stopped and has saved, raised an error, or died."""

    kind: Kind
    index: int
    incarnation: int
    how: Literal["finished", "stopped", "failed", "died"]
    error_kind: str = ""  # of the error it raised
    message: str = ""
    step: int = 0

    @property
    def said(self) -> str:
        """Return how it ended, for people."""
        return f"died: {self.message}" if self.how == "died" else f"failed: {self.message}"


@dataclass(frozen=True)
class StopAsked:
    """Somebody wants the job to stop: after saving, or at once."""

    at_once: bool = False


@dataclass(frozen=True)
class ScaleAsked:
    """Somebody wants another number of trainers; see `Supervision.sizes`."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class HostDraining:
    """These hosts are about to go."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class CapacitySeen:
    """The cluster has place for this many trainers, those that run included."""

    num_trainers: int


Event = ServerUp | GroupStarted | GroupNotPlaced | Beat | Ended | StopAsked | ScaleAsked | HostDraining | CapacitySeen


@dataclass(frozen=True)
class StartServer:
    """Start a table server, at an address that it had before where there is one."""

    index: int
    incarnation: int
    address: str


@dataclass(frozen=True)
class StopServer:
    """Let a table server save and end."""

    index: int
    incarnation: int


@dataclass(frozen=True)
class EndServer:
    """End a table server at once."""

    index: int
    incarnation: int


@dataclass(frozen=True)
class FormGroup:
    """Place trainers and let them train with these servers."""

    generation: int
    size: int
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class AskGroup:
    """Ask a group to finish its step, save and end."""

    generation: int


@dataclass(frozen=True)
class EndGroup:
    """End all trainers of a group at once."""

    generation: int


@dataclass(frozen=True)
class Say:
    """Tell whoever watches."""

    message: str
    is_failure: bool = False


@dataclass(frozen=True)
class Finish:
    """The job is over; nothing of it runs any more."""

    reason: Literal["finished", "stopped", "failed"]
    cause: str
    error_kind: str
    step: int


Action = StartServer | StopServer | EndServer | FormGroup | AskGroup | EndGroup | Say | Finish

"""A cluster without processes, for tests of what a supervisor decides: it does what it is told, and checks it."""

from dataclasses import dataclass, field

from mfdist.launch.happenings import (
    Beat,
    Ended,
    EndGroup,
    EndServer,
    Finish,
    FormGroup,
    GroupStarted,
    Say,
    ServerUp,
    StartServer,
)
from mfdist.launch.standing import Limits
from mfdist.launch.supervise import Supervision

LIMITS = Limits(silence_s=10, stall_s=100, start_s=60, replace_s=30, stop_s=20, max_failures=3, backoff_s=1.0)


@dataclass
class World:
    """A cluster that does at once what it is told, and remembers what it was told."""

    policy: Supervision
    now: float = 0.0
    acted: list = field(default_factory=list)
    group: FormGroup | None = None
    servers: dict = field(default_factory=dict)  # index → incarnation
    is_stalled: bool = False
    hosts: tuple[str, ...] = ("a", "a", "b", "b", "c", "c")

    def decide(self):
        actions = self.policy.decide(self.now)
        for action in actions:
            self.acted.append(action)
            match action:
                case FormGroup():
                    assert self.group is None, "two groups at a time"
                    self.group = action
                case EndGroup():
                    assert self.group is None or self.group.generation == action.generation
                    self.group = None
                case StartServer():
                    assert action.index not in self.servers, "two servers in one slot"
                    self.servers[action.index] = action.incarnation
                case EndServer():
                    self.servers.pop(action.index, None)
                case Finish():
                    assert self.group is None and not self.servers, "something still runs"
        return actions

    def hear(self, event):
        self.policy.handle(event, self.now)
        return self.decide()

    def serve(self):
        """Let all servers come up where they were, or where there is place."""
        for index, incarnation in list(self.servers.items()):
            if self.policy.servers[index].phase == "starting":
                self.hear(ServerUp(index, incarnation, f"{self.hosts[index]}:{index}", self.hosts[index]))

    def train(self):
        """Let the group that was formed train."""
        assert self.group is not None
        self.hear(GroupStarted(self.group.generation, self.hosts[: self.group.size]))

    def run(self):
        self.decide()
        self.serve()
        self.train()

    def beat(self, committed=0):
        if self.group is not None:
            for rank in range(self.group.size):
                self.hear(Beat("trainer", rank, self.group.generation, True, committed))
        for index, incarnation in list(self.servers.items()):
            self.hear(Beat("server", index, incarnation))

    def ended(self, rank, how, kind="", message="it broke"):
        return self.hear(Ended("trainer", rank, self.group.generation, how, kind, message))

    def all_ended(self, how):
        for rank in range(self.group.size):
            generation = self.group.generation
            self.hear(Ended("trainer", rank, generation, how, step=7))

    def wait(self, seconds):
        for _ in range(int(seconds)):
            self.now += 1.0
            self.decide()
            self.beat()

    def said(self):
        return [action.message for action in self.acted if isinstance(action, Say)]


def kinds(actions):
    return [type(action) for action in actions]

"""What a supervisor decides: the pure part, from what happened to what is to be done.

Call order: `handle` for every event, `decide` after that and every second or so. Both take the time, in seconds on one
clock that never goes back; `decide` returns actions, to be carried out in their order. Nothing here waits, calls or
reads a clock, so every decision can be tested.

A job's table servers are started first; then trainers form a group. A group is all or nothing: where one of its
trainers ends, all of it is ended, and the next group goes on from the last commit. Servers are started again one by
one, while the group waits; only a server that comes back under another address ends the group. Servers may be pairs:
then trainers go on with the other one, are told of a new address, and nobody waits.
"""

from collections.abc import Sequence
from typing import Literal

from mfdist.launch.happenings import (
    Action,
    AskGroup,
    Beat,
    CapacitySeen,
    Ended,
    EndGroup,
    EndServer,
    Event,
    Finish,
    FormGroup,
    GroupNotPlaced,
    GroupStarted,
    HostDraining,
    Say,
    ScaleAsked,
    ServerUp,
    StartServer,
    StopAsked,
    StopServer,
)
from mfdist.launch.standing import Group, Limits, Server, are_serving

#: Kinds of errors that come again however often a trainer or server is started.
FATAL_KINDS = frozenset({"config", "row_id", "data", "non_finite", "internal"})
#: How long an error waits for the death that may have caused it in another trainer.
_CAUSE_S = 1.5
#: A supervisor that was itself away this long hears nothing meanwhile; silence does not count then.
_AWAY_S = 2.0


class Supervision:
    """The state of a job, and what follows from it.

    Args:
        sizes: numbers of trainers a group may have, largest first; the first is wanted, the others are taken where
            there is no place for it.
        num_servers: how many table servers.
        limits: how patient.
        replicas: 2 where servers are pairs, one after the other.
        last_commit: the step of the last commit when the job starts, 0 where there is none.
    """

    def __init__(
        self, sizes: Sequence[int], num_servers: int, limits: Limits, *, replicas: int = 1, last_commit: int = 0
    ) -> None:
        self.sizes = tuple(sizes)
        self.limits = limits
        self.servers = [Server() for _ in range(num_servers)]
        self.replicas = replicas
        self.group: Group | None = None
        self.wanted: Literal["run", "stop", "end"] = "run"
        self.last_commit = last_commit
        self.failures: list[str] = []  # since the last commit
        self.generation = 0
        self.not_before = 0.0
        self.outcome: Finish | None = None
        self._size = self.sizes[0]
        self._draining: set[str] = set()
        self._is_finished = False
        self._heard_at: float | None = None
        self._grow_at = 0.0
        self._stopping_since: float | None = None
        self._told: list[Action] = []

    @property
    def phase(self) -> str:
        """Return the state in one word."""
        if self.outcome is not None:
            return self.outcome.reason
        if self.wanted != "run":
            return "stopping"
        if self.group is not None:
            words = {"placing": "starting trainers", "training": "training", "finishing": "finishing"}
            return words.get(self.group.phase, "handing over")
        if not are_serving(self.servers, self.replicas):
            return "starting servers"
        return "waiting"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return where servers are, or were when they last were up; empty before that."""
        return tuple(server.address for server in self.servers)

    def handle(self, event: Event, now: float) -> None:
        """Take in what happened."""
        match event:
            case StopAsked():
                self.wanted = "end" if event.at_once or self.wanted == "end" else "stop"
                self._stopping_since = self._stopping_since or now
            case ScaleAsked():
                self.sizes = event.sizes
                self._size = self.sizes[0]
            case HostDraining():
                self._draining = set(event.hosts)
            case CapacitySeen():
                self._grow(event.num_trainers, now)
            case ServerUp():
                self._server_up(event, now)
            case GroupStarted() if self._is_current(event.generation):
                assert self.group is not None
                self.group.phase, self.group.since, self.group.moved = "training", now, now
                self.group.hosts = dict(enumerate(event.hosts))
                self.group.heard = dict.fromkeys(range(self.group.size), now)
            case GroupNotPlaced() if self._is_current(event.generation):
                self._not_placed(event, now)
            case Beat():
                self._beat(event, now)
            case Ended():
                self._ended(event, now)
            case _:
                pass  # of a group that is no more

    def decide(self, now: float) -> list[Action]:
        """Return what is to be done now."""
        if self._is_finished:
            return []
        self._allow_for_absence(now)
        self._look_for_silence(now)
        self._decide_on_group(now)
        actions, self._told = self._told, []
        actions += self._starts(now) if self.outcome is None and self.wanted == "run" else self._ending(now)
        return actions

    # Events.

    def _is_current(self, generation: int) -> bool:
        return self.group is not None and self.group.generation == generation

    def _server_up(self, event: ServerUp, now: float) -> None:
        server = self.servers[event.index]
        if server.incarnation == event.incarnation and server.phase == "starting":
            server.phase, server.heard, server.address, server.host = "up", now, event.address, event.host

    def _beat(self, event: Beat, now: float) -> None:
        if event.kind == "server":
            server = self.servers[event.index]
            if server.incarnation == event.incarnation:
                server.heard = now
        elif self._is_current(event.incarnation):
            assert self.group is not None
            self.group.heard[event.index] = now
            if event.is_moving:
                self.group.moved = now
            if event.committed > self.last_commit:
                self.last_commit = event.committed
                self.failures.clear()
                for server in self.servers:
                    server.num_failures = 0

    def _not_placed(self, event: GroupNotPlaced, now: float) -> None:
        assert self.group is not None
        size, self.group = self.group.size, None
        self._told.append(EndGroup(event.generation))
        smaller = [candidate for candidate in self.sizes if candidate < size]
        if smaller:
            self._size = smaller[0]
            self._told.append(Say(f"no place for {size} trainers within {self.limits.replace_s:g} s; going on with "
                                  f"{self._size}"))  # fmt: skip
            self._grow_at = now + self.limits.grow_s
        else:
            self._failed(f"there is no place for {size} trainers: {event.cause}", now)

    def _grow(self, num_trainers: int, now: float) -> None:
        if self.group is None or self.group.phase != "training" or now < self._grow_at:
            return
        larger = [size for size in self.sizes if self.group.size < size <= num_trainers]
        if larger:
            self._size = larger[0]
            self._grow_at = now + self.limits.grow_s

    def _ended(self, event: Ended, now: float) -> None:
        if event.kind == "server":
            self._server_ended(event, now)
            return
        if not self._is_current(event.incarnation):
            return
        group = self.group
        assert group is not None
        group.ended[event.index] = event
        group.heard.pop(event.index, None)
        if event.index == 0 and event.how == "finished":
            group.since, group.phase = now, "finishing"  # all is committed, whatever becomes of the others
        elif event.how not in ("finished", "stopped") and group.phase not in ("stopping", "failing", "finishing"):
            group.since, group.phase = now, "failing"

    def _server_ended(self, event: Ended, now: float) -> None:
        server = self.servers[event.index]
        if server.incarnation != event.incarnation or server.phase == "absent":
            return
        was_asked = server.phase == "stopping"
        server.phase = "absent"
        if was_asked or self.wanted != "run" or self.outcome is not None:
            return
        if event.how in ("finished", "stopped"):
            self._told.append(Say(f"server-{event.index} was asked to stop and has saved its rows; starting it again"))
        elif self.replicas > 1 and self.servers[event.index ^ 1].phase == "up":
            server.num_failures += 1
            pause_s = self.limits.pause_s(server.num_failures)
            server.not_before = now + pause_s
            after = f" in {pause_s:g} s" if pause_s else ""
            words = f"server-{event.index} {event.said}; the other one of its pair goes on; starting it again{after}"
            self._told.append(Say(words, is_failure=True))
        elif event.how == "failed" and event.error_kind in FATAL_KINDS:
            self._give_up(f"server-{event.index}: {event.message}", event.error_kind)
        else:
            then = "starting it again from its log" if server.address else "starting it again"
            self._failed(f"server-{event.index} {event.said}", now, then, "; trainers wait")

    # Decisions.

    def _allow_for_absence(self, now: float) -> None:
        away_s = 0.0 if self._heard_at is None else now - self._heard_at
        self._heard_at = now
        if away_s > _AWAY_S:
            for server in self.servers:
                server.heard += away_s
            if self.group is not None:
                self.group.heard = {rank: heard + away_s for rank, heard in self.group.heard.items()}
                self.group.moved += away_s

    def _look_for_silence(self, now: float) -> None:
        limits = self.limits
        for index, server in enumerate(self.servers):
            late_s = now - (server.heard if server.phase == "up" else server.since)
            allowed_s = {"up": limits.silence_s, "starting": limits.start_s, "stopping": limits.stop_s}
            if late_s > allowed_s.get(server.phase, float("inf")):
                self._told.append(EndServer(index, server.incarnation))
                is_late = server.phase == "starting"
                why = (
                    f"did not start in launch.start_s={limits.start_s:g} s" if is_late else f"silent for {late_s:.0f} s"
                )
                ended = Ended("server", index, server.incarnation, "died", message=why)
                self._server_ended(ended, now)
        group = self.group
        if group is None or group.phase not in ("training", "placing"):
            return
        silent = [rank for rank, heard in group.heard.items() if now - heard > limits.silence_s]
        for rank in silent:
            late_s = now - group.heard[rank]
            message = f"on {group.hosts.get(rank, '?')} was silent for {late_s:.0f} s"
            self._ended(Ended("trainer", rank, group.generation, "died", message=message), now)
        if group.phase == "training" and not group.ended and now - group.moved > limits.stall_s:
            message = f"made no step for {now - group.moved:.0f} s, longer than launch.stall_s"
            self._ended(Ended("trainer", 0, group.generation, "died", message=message), now)
        if group.phase == "placing" and now - group.since > limits.start_s:
            self._end_group()
            self._failed(f"the trainers did not start within launch.start_s={limits.start_s:g} s", now)

    def _decide_on_group(self, now: float) -> None:
        group = self.group
        if group is None:
            return
        if group.phase == "failing":
            causes = sorted(group.ended.items(), key=lambda item: _rank_of_cause(item[1]))
            rank, cause = causes[0]
            is_certain = _rank_of_cause(cause) < 2 or len(group.ended) == group.size
            if is_certain or now - group.since > _CAUSE_S:
                self._end_group()
                if cause.how == "failed" and cause.error_kind in FATAL_KINDS:
                    self._give_up(cause.message, cause.error_kind)
                else:
                    self._failed(f"trainer-{rank} {cause.said}", now)
            return
        is_late = group.phase in ("stopping", "finishing") and now - group.since > self.limits.stop_s
        if group.phase == "finishing":
            if len(group.ended) == group.size or is_late:
                self._end_group()
                self.outcome = Finish("finished", "", "", group.ended[0].step)
            return
        if len(group.ended) == group.size:
            hows = [ended.how for ended in group.ended.values()]
            step = max(ended.step for ended in group.ended.values())
            self._end_group()
            if any(how in ("died", "failed") for how in hows):  # while it was stopping: from the last commit, then
                self._told.append(Say("trainers ended before they had saved; going on from the last commit"))
            if self.wanted == "run":
                self._told.append(Say(f"the trainers have saved step {step:,} and hand over"))
            return
        if is_late:
            self._told.append(Say("the trainers did not stop in time; they are ended"))
            self._end_group()
            return
        self._ask_group(group, now)

    def _ask_group(self, group: Group, now: float) -> None:
        """Ask the group to save and end where it must become another one; end it where there is nothing to save."""
        has_moved = self.replicas == 1 and group.addresses != self.addresses
        if group.phase == "placing":
            if self.wanted != "run" or self.outcome is not None or group.size != self._size:
                self._end_group()
        elif group.phase == "training":
            if has_moved and are_serving(self.servers, self.replicas):
                self._end_group()
                self._told.append(Say("a table server has come back elsewhere; trainers go on from the last commit"))
            elif (
                self.wanted != "run"
                or group.size != self._size
                or (self._draining and self._draining & {*group.hosts.values(), *self._server_hosts()})
            ):
                group.phase, group.since = "stopping", now
                self._told.append(AskGroup(group.generation))
                if self.wanted == "run":
                    self._told.append(Say("asking the trainers to save and hand over"))

    def _server_hosts(self) -> set[str]:
        return {server.host for server in self.servers if server.phase == "up"}

    def _starts(self, now: float) -> list[Action]:
        """Return what starts what is missing."""
        actions: list[Action] = []
        for index, server in enumerate(self.servers):
            if server.phase == "up" and server.host in self._draining and self.group is None:
                server.phase, server.since = "stopping", now
                actions.append(StopServer(index, server.incarnation))
        if now < self.not_before:
            return actions
        for index, server in enumerate(self.servers):
            if server.phase == "absent" and now >= server.not_before:
                server.phase, server.since, server.incarnation = "starting", now, server.incarnation + 1
                at = "" if server.host in self._draining else server.address
                actions.append(StartServer(index, server.incarnation, at))
        is_stopping = any(server.phase == "stopping" for server in self.servers)
        if self.group is None and not is_stopping and are_serving(self.servers, self.replicas):
            self.generation += 1
            self.group = Group(self.generation, self._size, now, addresses=self.addresses)
            actions.append(FormGroup(self.generation, self._size, self.addresses))
        return actions

    def _ending(self, now: float) -> list[Action]:
        """Return what ends the job: trainers, then servers, then itself."""
        actions: list[Action] = []
        if self.group is not None and (self.wanted == "end" or self.outcome is not None):
            self._end_group()
            actions, self._told = [*actions, *self._told], []
        if self.group is not None:
            return actions
        for index, server in enumerate(self.servers):
            if self.wanted == "end" and server.phase != "absent":
                server.phase = "absent"
                actions.append(EndServer(index, server.incarnation))
            elif server.phase in ("up", "starting"):
                server.phase, server.since = "stopping", now
                actions.append(StopServer(index, server.incarnation))
        if all(server.phase == "absent" for server in self.servers):
            self.outcome = self.outcome or Finish("stopped", "", "", self.last_commit)
            self._is_finished = True
            actions.append(self.outcome)
        return actions

    def _end_group(self) -> None:
        assert self.group is not None
        self._told.append(EndGroup(self.group.generation))
        self.group = None

    def _failed(self, cause: str, now: float, then: str = "going on from the last commit", meanwhile: str = "") -> None:
        """Count a failure; go on after a pause that grows, or give up. Tell the cause, and what is done."""
        if self.outcome is not None or self.wanted != "run":
            return
        self.failures.append(cause)
        count = len(self.failures)
        if count > self.limits.max_failures:
            self._give_up(
                f"{count} failures in a row without a new commit are more than launch.max_failures="
                f"{self.limits.max_failures}; the last: {cause}",
                "unavailable",
            )
            return
        pause_s = self.limits.pause_s(count)
        self.not_before = max(self.not_before, now + pause_s)
        after = f" in {pause_s:g} s" if pause_s else ""
        self._told.append(Say(f"{cause}; {then}{after}{meanwhile}", is_failure=True))

    def _give_up(self, cause: str, kind: str) -> None:
        self.outcome = Finish("failed", cause, kind, self.last_commit)


def _rank_of_cause(ended: Ended) -> int:
    """Return how near to the root a trainer's end is: what will come again, then deaths, then other errors."""
    if ended.how == "failed" and ended.error_kind in FATAL_KINDS:
        return 0
    return {"died": 1, "failed": 2}.get(ended.how, 3)

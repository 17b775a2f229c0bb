"""The actor that keeps a job running: hears its actors, decides, acts, and tells whoever watches.

It outlives the command that started it, and is started again by Ray where it dies; its actors end with it, so that it
always begins with nothing running.
"""

import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mfdist.config_places import LaunchConfig
from mfdist.errors import ConfigError, MfdistError, UnavailableError
from mfdist.launch import cluster, local_cluster
from mfdist.launch.hands import Hands
from mfdist.launch.happenings import (
    Action,
    AskGroup,
    Beat,
    CapacitySeen,
    EndGroup,
    EndServer,
    Event,
    Finish,
    FormGroup,
    HostDraining,
    Say,
    ScaleAsked,
    ServerUp,
    StartServer,
    StopAsked,
    StopServer,
)
from mfdist.launch.job import Job, group_sizes
from mfdist.launch.pulse import Answer, Report
from mfdist.launch.standing import Limits
from mfdist.launch.supervise import Supervision
from mfdist.training.events import Evaluated, Noted, Saved, Started, Stepped, Stopped, Warned
from mfdist.training.events import Event as TrainingEvent

_TURN_S = 0.1
_SURVEY_S = 2.0  # between looks at the cluster itself
_STORE_S = 1.0
_KEPT_EVENTS = 5000
_LASTING = (Started, Stepped, Evaluated, Saved)  # what a watcher who comes later is told
_PARTING_S = 1.0  # for watchers to leave: Ray lets those wait long whose cluster is gone
_LINGER_S = 5.0  # after the end, for whoever watches


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a watcher has not seen yet.

    Args:
        events: of training, and warnings of the supervisor.
        position: to ask for next.
        state: of the job, as JSON values; see `Supervisor.state`.
    """

    events: tuple[TrainingEvent, ...]
    position: int
    state: dict[str, Any]


@dataclass
class _Latest:
    """What was last heard, for the display."""

    reports: dict[str, tuple[float, Report]] = field(default_factory=dict)
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    restarts: int = 0
    recoveries_s: list[float] = field(default_factory=list)  # from the last step of a group to the first of the next
    stepped_at: float | None = None
    is_broken: bool = False


class Supervisor:
    """One job's supervisor. `beat` is called by its actors, the rest by commands; all may be called at any time.

    Args:
        job: what is to run.
        launch: [launch] of its configuration.
        batch: batch size and micro-batches, which decide what it can be scaled to.
        num_server_threads: of a table server.
    """

    def __init__(self, job: Job, launch: LaunchConfig, batch: tuple[int, int], num_server_threads: int) -> None:
        from mfdist.launch.holding import Holding

        self._job = job
        self._launch = launch
        self._batch = batch
        of_elastic = {"grow_s": launch.elastic.grow_s}
        limits = Limits(
            **{name: getattr(launch, name) for name in Limits.__dataclass_fields__.keys() - of_elastic} | of_elastic
        )
        last_commit = _last_commit(job)
        self._policy = Supervision(job.sizes, job.servers, limits, replicas=job.replicas, last_commit=last_commit)
        if job.files.read_state().get("wanted") in ("stop", "end"):
            self._policy.handle(StopAsked(), time.monotonic())
        self._holding = Holding(job.files.folder)
        data = "" if launch.server_data is None else str(launch.server_data)
        self._hands = Hands(
            job,
            silence_s=launch.silence_s,
            replace_s=launch.replace_s,
            server_data=data,
            num_server_threads=num_server_threads,
        )
        self._lock = threading.Lock()
        self._told = threading.Condition(self._lock)
        self._end_is_known = threading.Event()
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._events: deque[TrainingEvent] = deque(maxlen=_KEPT_EVENTS)
        self._num_events = 0
        self._latest = _Latest(step=last_commit)
        self._asked: set[tuple[str, int, int]] = set()  # actors that are to stop
        self._current: set[tuple[str, int, int]] = set()  # actors that are to be
        self._addresses: tuple[str, ...] = ()  # of table servers
        self._num_heard: dict[tuple[str, int, int], int] = {}  # actor → events it has told of
        self._state: dict[str, Any] = self._described()
        self._surveyed = self._stored = 0.0
        threading.Thread(target=self._run, name="mfdist-supervisor", daemon=True).start()

    def beat(self, report: Report) -> Answer:
        """Hear an actor; answer what it is to do."""
        post = report.post
        key = (post.kind, post.index, post.incarnation)
        with self._lock:
            if key not in self._current:
                return Answer(order="end")
            self._latest.reports[post.name] = (time.monotonic(), report)
            heard = self._num_heard.get(key, 0)  # a report comes again where its answer was lost
            for event in report.events[max(0, heard - report.first) :]:
                self._hear(event)
            if report.events:
                self._num_heard[key] = max(heard, report.first + len(report.events))
                self._told.notify_all()
            is_asked = key in self._asked
        if report.address:
            self._inbox.put(ServerUp(post.index, post.incarnation, report.address, report.host))
        self._inbox.put(Beat(post.kind, post.index, post.incarnation, bool(report.events), report.committed))
        return Answer(order="stop" if is_asked else "go on", addresses=self._addresses)

    def watch(self, position: int, wait_s: float) -> Watched:
        """Return what was told since `position`, waiting a while where there is nothing.

        Args:
            position: 0 at first, or -1 for the latest event of each kind alone; then what was answered before.
            wait_s: how long to wait.
        """
        with self._lock:
            if position < 0:
                latest = {type(event): event for event in self._events if isinstance(event, _LASTING)}
                return Watched(events=tuple(latest.values()), position=self._num_events, state=self._state)
            if position >= self._num_events and self._policy.outcome is None:
                self._told.wait(wait_s)
            first = self._num_events - len(self._events)
            events = tuple(self._events)[max(0, position - first) :]
            if self._state["outcome"] is not None and not events:
                self._end_is_known.set()
            return Watched(events=events, position=self._num_events, state=self._state)

    def stop(self, at_once: bool) -> None:
        """Stop the job, after saving or at once."""
        self._inbox.put(StopAsked(at_once))

    def scale(self, trainers: int) -> tuple[int, ...]:
        """Go on with another number of trainers, from a commit of the next step; return the sizes that will do.

        Raises:
            ConfigError: the batch cannot be divided so, or [launch.elastic] says fewer; nothing was changed.
        """
        elastic = self._launch.elastic
        if elastic.max and trainers > elastic.max:
            raise ConfigError(f"--trainers must be at most launch.elastic.max={elastic.max}; got {trainers}")
        if trainers < elastic.min:
            raise ConfigError(f"--trainers must be at least launch.elastic.min={elastic.min}; got {trainers}")
        cpus, gpus = self._job.cpus, self._job.gpus
        places = sum(int(host.gpus / gpus if gpus else host.cpus / cpus + 1e-6) for host in cluster.hosts())
        if trainers > places:
            each, remedy = ("one GPU", "") if gpus else (f"{cpus:g} CPUs", ", or lower launch.cpus at the next launch")
            raise UnavailableError(
                f"the cluster must have place for {trainers} trainers of {each}; it has for {places}; add hosts{remedy}"
            )
        sizes = group_sizes(trainers, min(elastic.min, trainers), *self._batch)
        self._job = self._job.scaled(trainers, sizes)
        self._job.files.write_job(self._job)
        self._inbox.put(ScaleAsked(sizes))
        return sizes

    # The thread.

    def _run(self) -> None:
        try:
            while not self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 - nobody else would hear of it
            import traceback

            traceback.print_exc()
            self._say(f"the supervisor has failed and begins anew: {error!r}")
            os._exit(1)  # Ray starts it again
        self._end_is_known.wait(_LINGER_S)
        time.sleep(_PARTING_S)
        if self._job.cluster.is_ours:
            local_cluster.ask_to_end(self._job.cluster)
        else:
            cluster.end_actor(cluster.own_handle())

    def _turn(self) -> bool:
        """Hear, decide and act once; return whether the job is over."""
        events: list[Event] = []
        try:
            events.append(self._inbox.get(timeout=_TURN_S))
            while True:
                events.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        now = time.monotonic()
        events += self._hands.look(now)
        events += self._survey(now)
        for event in events:
            self._policy.handle(event, now)
        actions = self._policy.decide(now)
        self._addresses = self._policy.addresses
        for action in actions:
            self._act(action, now)
        self._keep_state(now, is_due=bool(actions))
        return any(isinstance(action, Finish) for action in actions)

    def _act(self, action: Action, now: float) -> None:
        match action:
            case StartServer(index, incarnation, address):
                self._expect("server", index, incarnation)
                self._hands.start_server(index, incarnation, address)
            case StopServer(index, incarnation):
                self._asked.add(("server", index, incarnation))
            case EndServer(index, _):
                self._dismiss("server", index)
                self._hands.end_server(index)
            case FormGroup(generation, size, addresses):
                for rank in range(size):
                    self._expect("trainer", rank, generation)
                self._hands.form_group(generation, size, addresses, now)
            case AskGroup(generation):
                self._asked.add(("trainer", 0, generation))  # who tells the others
            case EndGroup():
                self._dismiss("trainer")
                self._hands.end_group()
                with self._lock:
                    self._latest.restarts += 1
                    self._latest.is_broken = True
            case Say(message, is_failure):
                self._say(message, is_failure=is_failure)
            case Finish():
                self._hands.let_go()
                self._finish(action)

    def _finish(self, finish: Finish) -> None:
        with self._lock:
            self._latest.reports.clear()
            self._told.notify_all()
        self._holding.release()

    def _expect(self, kind: Literal["trainer", "server"], index: int, incarnation: int) -> None:
        with self._lock:
            self._current = {key for key in self._current if key[:2] != (kind, index)} | {(kind, index, incarnation)}
            self._latest.reports.pop(f"{kind}-{index}", None)  # of the one before

    def _dismiss(self, kind: Literal["trainer", "server"], index: int | None = None) -> None:
        with self._lock:
            gone = {key for key in self._current if key[0] == kind and index in (None, key[1])}
            self._current -= gone
            self._asked -= gone
            for key in gone:
                self._num_heard.pop(key, None)
                self._latest.reports.pop(f"{key[0]}-{key[1]}", None)

    def _survey(self, now: float) -> list[Event]:
        if now - self._surveyed < _SURVEY_S:
            return []
        self._surveyed = now
        try:
            events: list[Event] = [HostDraining(cluster.draining_hosts())]
            group = self._policy.group
            if group is not None and group.phase == "training" and group.size < self._policy.sizes[0]:
                events.append(CapacitySeen(self._hands.free_trainer_places()))
            return events
        except (MfdistError, RuntimeError):
            return []

    # What is told.

    def _say(self, message: str, *, is_failure: bool = False) -> None:
        with self._lock:
            self._hear(Warned(message=message) if is_failure else Noted(message=message))
            self._told.notify_all()

    def _hear(self, event: TrainingEvent) -> None:
        """Keep an event for watchers. Under the lock."""
        match event:
            case Stepped():
                latest = self._latest
                latest.step, latest.loss, latest.tokens_per_s = event.step, event.loss, event.tokens_per_s
                now, before = time.monotonic(), latest.stepped_at
                if latest.is_broken and before is not None:
                    latest.recoveries_s.append(now - before)
                latest.stepped_at, latest.is_broken = now, False
            case Stopped() if event.reason != "finished":
                if self._policy.wanted == "run":
                    return  # one group hands over to the next
                event = replace(event, reason="request")
        self._events.append(event)
        self._num_events += 1

    def _keep_state(self, now: float, *, is_due: bool) -> None:
        described = self._described()
        with self._lock:
            self._state = described
            if is_due:
                self._told.notify_all()
        if is_due or now - self._stored > _STORE_S:
            self._stored = now
            try:
                self._job.files.write_state(described)
            except OSError as error:
                self._say(f"the state cannot be stored: {error}")

    def _described(self) -> dict[str, Any]:
        """Return the state of the job as JSON values."""
        policy, latest = self._policy, self._latest
        outcome = policy.outcome if policy._is_finished else None
        now = time.monotonic()
        return {
            "run": self._job.run,
            "identity": self._job.identity,
            "phase": policy.phase,
            "wanted": policy.wanted,
            "address": self._job.cluster.address,
            "time": time.time(),
            "step": latest.step,
            "loss": latest.loss,
            "tokens_per_s": latest.tokens_per_s,
            "committed": policy.last_commit,
            "trainers": {"wanted": policy.sizes[0], "running": policy.group.size if policy.group else 0},
            "groups": policy.generation,
            "restarts": latest.restarts,
            "recoveries_s": list(latest.recoveries_s),
            "failures": list(policy.failures),
            "actors": [self._actor(name, phase, now) for name, phase in self._phases()],
            "outcome": None
            if outcome is None
            else {"reason": outcome.reason, "cause": outcome.cause, "kind": outcome.error_kind, "step": outcome.step},
        }

    def _phases(self) -> list[tuple[str, str]]:
        policy = self._policy
        group = policy.group
        phases = {"placing": "starting", "training": "training", "stopping": "saving"}
        trainers = (
            []
            if group is None
            else [(f"trainer-{rank}", phases.get(group.phase, "ending")) for rank in range(group.size)]
        )
        names = {"up": "serving", "absent": "waiting"}
        servers = [(f"server-{i}", names.get(server.phase, server.phase)) for i, server in enumerate(policy.servers)]
        return trainers + servers

    def _actor(self, name: str, phase: str, now: float) -> dict[str, Any]:
        heard = self._latest.reports.get(name)
        report = None if heard is None else heard[1]
        return {
            "name": name,
            "state": phase,
            "host": report.host if report else None,
            "pid": report.pid if report else None,
            "address": (report.address or None) if report else None,
            "role": (report.role or None) if report else None,
            "memory_bytes": report.memory_bytes if report else None,
            "host_received_bytes": report.received_bytes if report else None,
            "host_sent_bytes": report.sent_bytes if report else None,
            "silent_s": None if heard is None else round(now - heard[0], 1),
        }


def _last_commit(job: Job) -> int:
    """Return the last committed step of a job's run, 0 where there is none; if none can be listed, the last known."""
    from mfdist.training.run import RunDirectory

    try:
        return max(RunDirectory.open(job.run).checkpoints.series.revisions(), default=0)
    except (MfdistError, OSError):  # of which trainers will tell
        return int(job.files.read_state().get("committed", 0))

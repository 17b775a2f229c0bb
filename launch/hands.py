"""A supervisor's hands: carries its decisions out in the cluster, and sees what became of them. Never waits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mfdist.errors import MfdistError, UnavailableError
from mfdist.launch import cluster
from mfdist.launch.cluster import Places, Reserved
from mfdist.launch.happenings import Ended, Event, GroupNotPlaced, GroupStarted, Kind
from mfdist.launch.job import Job
from mfdist.launch.pulse import Post
from mfdist.launch.server import Duty, TableServer, access
from mfdist.launch.trainer import Assignment, Trainer

_ANSWER_S = 10.0  # for what is known to be there


@dataclass
class Actor:
    """An actor that was started."""

    post: Post
    handle: Any
    work: Any = None  # the call that is its whole life


@dataclass
class _Forming:
    """A group on its way."""

    generation: int
    size: int
    addresses: tuple[str, ...]
    places: Places
    until: float
    meetings: list[Any] = field(default_factory=list)


class Hands:
    """What a job has in the cluster. Called by one thread.

    Args:
        job: whose.
        silence_s, replace_s: of [launch].
        server_data: of [launch]; empty: in the run's folder.
        num_server_threads: of a table server.
    """

    def __init__(
        self, job: Job, *, silence_s: float, replace_s: float, server_data: str, num_server_threads: int
    ) -> None:
        self._job = job
        self._silence_s, self._replace_s = silence_s, replace_s
        self._server_data = server_data
        self._num_server_threads = num_server_threads
        self._supervisor = cluster.own_handle()
        cluster.take_away_places(job.supervisor_name)
        self.trainer = Reserved(cpus=job.cpus, gpus=job.gpus)
        self.server = Reserved(cpus=job.server_cpus, memory_bytes=max(1, job.server_bytes))
        self.servers: dict[int, Actor] = {}
        self.trainers: dict[int, Actor] = {}
        self._forming: _Forming | None = None
        self._trainer_places: Places | None = None
        self._server_places: dict[int, Places] = {}  # by pair; without pairs all are in one

    # Servers.

    def start_server(self, index: int, incarnation: int, address: str) -> None:
        """Begin to start a table server."""
        places, place = self._place(index)
        post = self._post("server", index, incarnation, self._num_server_threads)
        handle = cluster.start_actor(
            TableServer,
            post,
            self._supervisor,
            name=f"{self._job.supervisor_name}-{post.name}-{incarnation}",
            reserved=self.server,
            places=places,
            index=place,
        )
        files = self._job.files
        data = files.server_data(index, self._server_data)
        peer = index ^ 1 if self._job.replicas > 1 else None
        duty = Duty(data=str(data), secrets=str(files.secrets), address=address, peer=peer)
        self.servers[index] = Actor(post, handle, handle.serve.remote(duty))

    def _place(self, index: int) -> tuple[Places, int]:
        """Return where a server belongs. Those of a pair are on different hosts, where there are any."""
        job = self._job
        pair, place = divmod(index, job.replicas) if job.replicas > 1 else (0, index)
        if pair not in self._server_places:
            name = f"{job.supervisor_name}-servers-{pair}"
            number, must = (job.servers, False) if job.replicas == 1 else (job.replicas, len(cluster.hosts()) > 1)
            self._server_places[pair] = Places(name, self.server, number, apart="must" if must else "may")
        return self._server_places[pair], place

    def end_server(self, index: int) -> None:
        """End a table server at once."""
        if (actor := self.servers.pop(index, None)) is not None:
            cluster.end_actor(actor.handle)

    # Trainers.

    def form_group(self, generation: int, size: int, addresses: tuple[str, ...], now: float) -> None:
        """Begin to place trainers; `look` goes on with it."""
        name = f"{self._job.supervisor_name}-trainers-{generation}"
        places = Places(name, self.trainer, size)
        self._trainer_places = places
        self._forming = _Forming(generation, size, addresses, places, now + self._replace_s)

    def end_group(self) -> None:
        """End all trainers at once, and give their places back."""
        self._forming = None
        for actor in self.trainers.values():
            cluster.end_actor(actor.handle)
        self.trainers.clear()
        if self._trainer_places is not None:
            self._trainer_places.give_back()
            self._trainer_places = None

    def let_go(self) -> None:
        """Give everything back."""
        self.end_group()
        for index in list(self.servers):
            self.end_server(index)
        for places in self._server_places.values():
            places.give_back()
        self._server_places.clear()

    # Both.

    def look(self, now: float) -> Iterator[Event]:
        """Yield what has happened since, and go on with what is under way."""
        for actors in (self.servers, self.trainers):
            for index, actor in list(actors.items()):
                if actor.work is not None and cluster.is_done(actor.work):
                    yield self._end_of(actor)
                    del actors[index]
                    cluster.end_actor(actor.handle)  # its process too
        if self._forming is not None:
            yield from self._go_on(self._forming, now)

    def free_trainer_places(self) -> int:
        """Return how many trainers the cluster has place for, those that run included."""
        return len(self.trainers) + cluster.free_places(self.trainer)

    def _go_on(self, forming: _Forming, now: float) -> Iterator[Event]:
        if not forming.meetings:
            if forming.places.are_ready():
                self._start_trainers(forming)
            elif now > forming.until:
                there = "; ".join(f"{host.address}: {host.cpus:g} CPUs, {host.gpus:g} GPUs" for host in cluster.hosts())
                yield GroupNotPlaced(forming.generation, f"the cluster has {there or 'no host'}")
                self._forming = None
            return
        if not all(cluster.is_done(meeting) for meeting in forming.meetings):
            failed = [index for index, meeting in enumerate(forming.meetings) if _is_broken(meeting)]
            yield from (self._broken(index, forming) for index in failed)
            return
        try:
            places = [cluster.answer(meeting, _ANSWER_S) for meeting in forming.meetings]
        except MfdistError:
            self._forming = None
            broken = [index for index, meeting in enumerate(forming.meetings) if _is_broken(meeting)]
            yield from (self._broken(index, forming) for index in broken)
            return
        self._forming = None
        hosts = [host for host, _ in places]
        size, num_hosts = forming.size, self._job.hosts
        ranks_per_host = size // num_hosts if size % num_hosts == 0 else size
        for rank, actor in self.trainers.items():
            assignment = Assignment(
                run=self._job.run,
                world_size=size,
                meeting=places[0],
                ranks_per_host=ranks_per_host,
                overrides=self._job.overrides,
                servers=self._server_overrides(forming.addresses),
            )
            actor.work = self.trainers[rank].handle.train.remote(assignment)
        yield GroupStarted(forming.generation, tuple(hosts))

    def _start_trainers(self, forming: _Forming) -> None:
        for rank, place in enumerate(forming.places.by_host()):
            post = self._post("trainer", rank, forming.generation, max(1, int(self._job.cpus)))
            handle = cluster.start_actor(
                Trainer,
                post,
                self._supervisor,
                name=f"{self._job.supervisor_name}-{post.name}-{forming.generation}",
                reserved=self.trainer,
                places=forming.places,
                index=place,
            )
            self.trainers[rank] = Actor(post, handle)
            forming.meetings.append(handle.meet.remote())

    def _broken(self, index: int, forming: _Forming) -> Ended:
        try:
            cluster.answer(forming.meetings[index], _ANSWER_S)
        except MfdistError as error:
            how: Any = "died" if error.kind == UnavailableError.kind else "failed"
            return Ended("trainer", index, forming.generation, how, error.kind, f"while it started: {error}")
        raise AssertionError("a meeting that is broken raises")

    def _end_of(self, actor: Actor) -> Ended:
        post = actor.post
        try:
            ended = cluster.answer(actor.work, _ANSWER_S)
            assert isinstance(ended, Ended)
            return ended
        except MfdistError as error:
            return Ended(post.kind, post.index, post.incarnation, "died", error.kind, str(error))

    def _server_overrides(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        from mfdist.table_server.addresses import is_loopback

        if not addresses:
            return ()
        listed = ", ".join(f'"{address}"' for address in addresses)
        keys = access(self._job.files.secrets, all(is_loopback(address) for address in addresses))
        return (f"servers.addresses=[{listed}]", *(f'servers.{key}="{value}"' for key, value in keys.items()))

    def _post(self, kind: Kind, index: int, incarnation: int, threads: int) -> Post:
        return Post(
            kind=kind,
            index=index,
            incarnation=incarnation,
            log=str(self._job.files.log(f"{kind}-{index}")),
            threads=threads,
            silence_s=self._silence_s,
        )


def _is_broken(meeting: Any) -> bool:
    """Return whether a call has come to an end that is none."""
    if not cluster.is_done(meeting):
        return False
    try:
        cluster.answer(meeting, _ANSWER_S)
    except MfdistError:
        return True
    return False

"""Starting a job: from a run and what was asked for to a supervisor that keeps it running."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdist.config import RunConfig
from mfdist.errors import ConfigError, UnavailableError
from mfdist.launch import cluster, local_cluster, machine
from mfdist.launch.cluster import Host
from mfdist.launch.head_port import check_head
from mfdist.launch.holding import Holding, is_held
from mfdist.launch.job import ClusterAddress, Job, JobFiles, group_sizes
from mfdist.launch.local_cluster import LocalHead

_SUPERVISOR_S = 60.0
_SERVERS = "servers.addresses=[{}]"  # stands for servers that are to come


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a launch is asked for, beside the run's configuration.

    Args:
        address: of a running cluster; None: a local one is started.
        overrides: `section.key=value`, for a run that was there before.
    """

    address: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a job fits its cluster.

    Args:
        cpus, gpus: of a trainer.
        threads: of a table server.
    """

    cpus: float
    gpus: float
    threads: int


def check_wish(config: RunConfig, overrides: Sequence[str], check: Callable[[Sequence[str]], RunConfig]) -> None:
    """Refuse what could not train, before anything is started.

    Args:
        config: of the run, overrides applied.
        overrides: those.
        check: gives the configuration with overrides.

    Raises:
        ConfigError: trainers do not divide the batch, or rows cannot lie on servers.
    """
    launch, training = config.launch, config.training
    group_sizes(launch.trainers, launch.elastic.min, training.batch_size, training.micro_batches)
    if config.servers.addresses:
        raise ConfigError(
            "mfdist launch starts the table servers itself; got servers.addresses; leave it out, and say how many: "
            "--servers N"
        )
    if launch.servers:
        if config.model.kind != "memory":
            raise ConfigError(f'table servers need a MemoryFormer; got model.kind="{config.model.kind}"; --servers 0')
        if launch.servers % config.servers.replicas:
            raise ConfigError(
                f"table servers must come in pairs where servers.replicas=2; got launch.servers={launch.servers}; "
                f"--servers {launch.servers + 1}, or servers.replicas=1"
            )
        check([*overrides, _SERVERS.format(", ".join(f'"127.0.0.1:{1 + n}"' for n in range(launch.servers)))])
    if launch.elastic.min and config.sharding.plan is not None:
        raise ConfigError(
            "a sharding.plan is for one number of trainers; got launch.elastic.min too; take a sharding.kind instead"
        )


@contextlib.contextmanager
def starting(wish: Wish, tell: Callable[[str], None]) -> Iterator["Starting"]:
    """Begin to start a job's cluster, to be part of once `join` returns; a failure leaves none behind."""
    with contextlib.ExitStack() as stack:
        head = None
        if wish.address is None:
            tell("starting a local Ray")
            head = LocalHead(_cores())
        elif wish.address != "auto":
            check_head(wish.address)  # before seconds go into loading
        begun = Starting(wish, head, stack)
        try:
            yield begun
        except BaseException:
            stack.close()
            begun.abandon()
            raise


class Starting:
    """A job on its way; made by `starting`."""

    def __init__(self, wish: Wish, head: LocalHead | None, stack: contextlib.ExitStack) -> None:
        self._wish, self._head, self._stack = wish, head, stack
        self._cluster: ClusterAddress | None = None

    def join(self, tell: Callable[[str], None]) -> list[Host]:
        """Wait for the cluster; return its hosts.

        Raises:
            UnavailableError: it cannot be reached or did not start.
        """
        if self._head is not None:
            self._cluster = self._head.ready()
        else:
            assert self._wish.address is not None
            self._cluster = cluster.find_address(self._wish.address)
        ours = self._cluster.is_ours
        tell("joining it" if ours else f"joining the cluster at {self._cluster.address}, and sending it this mfdist")
        self._stack.enter_context(cluster.joined_cluster(self._cluster, ships_code=not ours))
        return cluster.hosts()

    def check(self, config: RunConfig, run: Path, tell: Callable[[str], None]) -> None:
        """Refuse hosts that could not train the run together; those of a cluster that was started for it could.

        Raises:
            ConfigError: with what is wrong, on which host.
        """
        assert self._cluster is not None
        if not self._cluster.is_ours:
            from mfdist.launch.preflight import check_hosts

            tell("looking at its hosts")
            check_hosts(config, run)

    def supervise(
        self, files: JobFiles, config: RunConfig, fit: Fit, server_bytes: int, tell: Callable[[str], None]
    ) -> Job:
        """Start the supervisor of a run that is there; return the job, which goes on by itself from here.

        Raises:
            UnavailableError: the run belongs to a live job.
        """
        assert self._cluster is not None
        files.make()
        Holding(files.folder).release()
        shutil.rmtree(files.secrets, ignore_errors=True)
        launch, training = config.launch, config.training
        sizes = group_sizes(launch.trainers, launch.elastic.min, training.batch_size, training.micro_batches)
        job = Job(
            run=str(files.run),
            identity=Job.new_identity(),
            cluster=self._cluster,
            trainers=sizes[0],
            sizes=sizes,
            cpus=fit.cpus,
            gpus=fit.gpus,
            servers=launch.servers,
            server_cpus=launch.server_cpus,
            server_bytes=server_bytes,
            replicas=config.servers.replicas,
            hosts=trainer_hosts(config, cluster.hosts(), fit),
            overrides=self._wish.overrides,
        )
        if launch.servers:
            tell("making certificates and tokens for the table servers")
            from mfdist.table_server.certificates import init_tls

            init_tls(files.secrets)
            shutil.rmtree(files.folder / "servers", ignore_errors=True)  # rows are those of the last commit
        (files.folder / "state.json").unlink(missing_ok=True)
        files.write_job(job)
        tell("starting the supervisor")
        from mfdist.launch.supervisor import Supervisor

        batch = (training.batch_size, training.micro_batches)
        handle = cluster.start_supervisor(Supervisor, job, launch, batch, fit.threads, name=job.supervisor_name)
        cluster.answer(handle.watch.remote(0, 0.0), _SUPERVISOR_S)
        if self._head is not None:
            self._head.hand_over()
        return job

    def abandon(self) -> None:
        """End what was started."""
        if self._cluster is not None and self._cluster.is_ours:
            local_cluster.end_local(self._cluster)
        elif self._head is not None:
            self._head.abandon()


def check_this_machine(config: RunConfig) -> None:
    """Refuse what a local Ray of this machine will lack, before there is one; GPUs are for Ray to find."""
    if config.training.device == "cpu" or not has_gpus():
        fit(config, [Host(node_id="", address="this machine", cpus=_cores(), gpus=0, memory_bytes=0)])


def has_gpus() -> bool:
    """Return whether this machine has NVIDIA GPUs, without loading torch."""
    return machine.num_gpus() > 0


def _cores() -> int:
    return int(machine.cpu()["usable_cores"] or 1)


def fit(config: RunConfig, hosts: Sequence[Host]) -> Fit:
    """Return what each trainer gets, and refuse what the cluster lacks.

    Raises:
        ConfigError: too few CPUs or GPUs; the message says how many there are.
    """
    launch, device = config.launch, config.training.device
    wanted = launch.trainers
    num_gpus = int(sum(host.gpus for host in hosts))
    if device == "cuda" or (device == "auto" and num_gpus):
        if num_gpus < wanted:
            raise ConfigError(
                f"each trainer needs a GPU; {wanted} trainers were asked for and the cluster has {num_gpus} GPUs; "
                f"{f'--trainers {num_gpus}, or ' if num_gpus else ''}--set training.device=cpu"
            )
        return Fit(cpus=launch.cpus or 1.0, gpus=1.0, threads=_server_threads(config, hosts))
    kept = [max(0.0, host.cpus - launch.server_cpus * (launch.servers / len(hosts))) for host in hosts]
    cpus = launch.cpus or _share(kept, wanted)
    places = sum(int(free / cpus + 1e-6) for free in kept)
    if places < wanted:
        listed = ", ".join(f"{host.address} {host.cpus:g}" for host in hosts)
        raise ConfigError(
            f"each trainer needs {cpus:g} CPUs; {wanted} trainers were asked for and the cluster has place for "
            f"{places} (CPUs: {listed}); --trainers {max(1, places)}, or a smaller launch.cpus, such as 0.5"
        )
    return Fit(cpus=cpus, gpus=0.0, threads=_server_threads(config, hosts))


def _share(cpus: Sequence[float], trainers: int) -> float:
    """Return the most whole CPUs that each trainer can have; 1 where there is not one for each."""
    share = int(max(cpus))
    while share > 1 and sum(int(free) // share for free in cpus) < trainers:
        share -= 1
    return float(max(1, share))


def _server_threads(config: RunConfig, hosts: Sequence[Host]) -> int:
    if config.launch.server_cpus >= 1:
        return int(config.launch.server_cpus)
    return max(1, int(min(host.cpus for host in hosts)) // 2)


def trainer_hosts(config: RunConfig, hosts: Sequence[Host], fit: Fit) -> int:
    """Return on how many hosts a plan takes the trainers to be: those they fill when packed, if equally many on each.

    Otherwise it is one, and `sharding.hosts` comes before all.
    """
    if config.sharding.hosts:
        return config.sharding.hosts
    rooms = sorted((int((host.gpus if fit.gpus else host.cpus / fit.cpus) + 1e-6) for host in hosts), reverse=True)
    left, filled = config.launch.trainers, []
    while left > 0 and rooms:
        filled.append(min(left, rooms.pop(0)))
        left -= filled[-1]
    return len(filled) if len(set(filled)) == 1 else 1


def find_job(run: Path) -> Job:
    """Return the job that was last launched in a run's folder.

    Raises:
        ConfigError: there is none.
    """
    return JobFiles(run.absolute()).read_job()


def check_alive(job: Job) -> None:
    """Raise UnavailableError where a job is over, or its cluster is gone."""
    state = job.files.read_state()
    if outcome := state.get("outcome"):
        raise UnavailableError(f"the job in {job.run} is over ({outcome['reason']}); {go_on(job)}")
    if job.cluster.is_ours and not local_cluster.is_head_alive(job.cluster):
        raise UnavailableError(f"the job in {job.run} is not running: its Ray is gone; {go_on(job)}")


def go_on(job: Job) -> str:
    """Return how to go on with a job that does not run."""
    import shlex

    return f"go on with it by mfdist launch --resume {shlex.quote(job.run)}"


@contextlib.contextmanager
def supervised(job: Job) -> Iterator[Any]:
    """Join a live job's cluster and give its supervisor's handle.

    Raises:
        UnavailableError: it does not run any more.
    """
    check_alive(job)
    with cluster.joined_cluster(job.cluster):
        try:
            handle = cluster.find_actor(job.supervisor_name)
        except UnavailableError:
            still = "; its supervisor, cut off, ends within a minute; then " if is_held(job.files.folder) else ": "
            raise UnavailableError(f"the job in {job.run} is not running{still}{go_on(job)}") from None
        yield handle

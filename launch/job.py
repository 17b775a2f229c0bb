"""What a launched job is: plain data, kept in the run's folder, from which any process can find it again.

RUN/launch/job.json       the job: its cluster, its size, its name there
RUN/launch/state.json     what its supervisor last knew, readable when nothing runs any more
RUN/launch/logs/          what each actor said
RUN/launch/secrets/       tokens and certificates, for the owner alone
RUN/launch/servers/       logs and checkpoints of table servers, unless [launch] says another folder
"""

import json
import os
import secrets
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from mfdist.errors import ConfigError

FOLDER = "launch"


@dataclass(frozen=True, kw_only=True)
class ClusterAddress:
    """Where a Ray cluster is.

    Args:
        address: HOST:PORT of its head.
        token_file: of a cluster that mfdist started; others take Ray's own settings.
        head_pid, head_began: the process that is such a cluster, and when it began, in seconds since the epoch.
        temp_dir: its folder.
    """

    address: str
    token_file: str = ""
    head_pid: int = 0
    head_began: float = 0.0
    temp_dir: str = ""

    @property
    def is_ours(self) -> bool:
        """Return whether mfdist started it for this job alone."""
        return self.head_pid != 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, as it was asked for.

    Args:
        run: the run's folder, absolute.
        identity: of this launch; part of its names in the cluster.
        cluster: where it runs.
        trainers: how many are wanted; `sizes` may be fewer.
        sizes: numbers of trainers that will do, largest first.
        cpus, gpus: of a trainer.
        servers, server_cpus, server_bytes: table servers, and what is reserved for each.
        replicas: 2 where servers are pairs, one after the other.
        hosts: on how many hosts ranks are taken to be, so that a plan does not change when a trainer moves.
        overrides: `section.key=value`, stored in the run once training goes on with them.
    """

    run: str
    identity: str
    cluster: ClusterAddress
    trainers: int
    sizes: tuple[int, ...]
    cpus: float
    gpus: float = 0.0
    servers: int = 0
    server_cpus: float = 0.0
    server_bytes: int = 0
    replicas: int = 1
    hosts: int = 1
    overrides: tuple[str, ...] = ()

    @staticmethod
    def new_identity() -> str:
        """Draw an identity."""
        return secrets.token_hex(4)

    @property
    def files(self) -> "JobFiles":
        """Return where its files are."""
        return JobFiles(Path(self.run))

    @property
    def supervisor_name(self) -> str:
        """Return the supervisor's name in the cluster."""
        return f"mfdist-supervisor-{self.identity}"

    def scaled(self, trainers: int, sizes: tuple[int, ...]) -> Self:
        """Return the job with another number of trainers."""
        return replace(self, trainers=trainers, sizes=sizes)


@dataclass(frozen=True)
class JobFiles:
    """The files of a job in its run's folder."""

    run: Path

    @property
    def folder(self) -> Path:
        """Return the folder of all of them."""
        return self.run / FOLDER

    @property
    def secrets(self) -> Path:
        """Return the folder of tokens and certificates."""
        return self.folder / "secrets"

    @property
    def logs(self) -> Path:
        """Return the folder of the actors' logs."""
        return self.folder / "logs"

    def make(self) -> None:
        """Make the folders."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)

    def log(self, actor: str) -> Path:
        """Return an actor's log."""
        return self.logs / f"{actor}.log"

    def server_data(self, index: int, folder: str = "") -> Path:
        """Return a table server's folder."""
        return (Path(folder) / "mfdist" / self.run.name if folder else self.folder / "servers") / str(index)

    def write_job(self, job: Job) -> None:
        """Store the job, at once or not at all."""
        _write(self.folder / "job.json", asdict(job))

    def read_job(self) -> Job:
        """Return the stored job.

        Raises:
            ConfigError: there is none.
        """
        path = self.folder / "job.json"
        try:
            tree = json.loads(path.read_text("utf-8"))
            cluster = ClusterAddress(**tree.pop("cluster"))
            sizes, overrides = tuple(tree.pop("sizes")), tuple(tree.pop("overrides"))
            return Job(cluster=cluster, sizes=sizes, overrides=overrides, **tree)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.run} must be the folder of a launched run; it has no launch/job.json; "
                f"start one by mfdist launch CONFIG --out {shlex.quote(str(self.run))}"
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} must be what mfdist launch wrote; {error}; launch again with --resume") from None

    def write_state(self, state: dict[str, Any]) -> None:
        """Store what the supervisor knows."""
        _write(self.folder / "state.json", state)

    def read_state(self) -> dict[str, Any]:
        """Return what the supervisor last knew; empty where it never said."""
        try:
            state = json.loads((self.folder / "state.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}


def group_sizes(wanted: int, fewest: int, batch_size: int, micro_batches: int) -> tuple[int, ...]:
    """Return the numbers of trainers that will do, largest first: those among which a batch can be divided.

    Args:
        wanted: the largest.
        fewest: the smallest; 0: `wanted` alone.
        batch_size, micro_batches: of [training].

    Raises:
        ConfigError: `wanted` itself does not divide the batch.
    """
    sizes = [size for size in range(wanted, (fewest or wanted) - 1, -1) if batch_size % (size * micro_batches) == 0]
    if not sizes or sizes[0] != wanted:
        fewer = next((size for size in range(wanted, 0, -1) if batch_size % (size * micro_batches) == 0), None)
        raise ConfigError(
            f"training.batch_size must be a multiple of trainers × micro_batches; got batch_size={batch_size}, "
            f"{wanted} trainers, micro_batches={micro_batches}; "
            + (f"{fewer} trainers would do" if fewer else "fewer micro_batches")
        )
    return tuple(sizes)


def _write(path: Path, tree: dict[str, Any]) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(tree, indent=1, default=str) + "\n", "utf-8")
    partial.replace(path)

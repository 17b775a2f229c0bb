"""A trainer: the actor that runs `mfdist train`'s own loop as one rank."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from mfdist.config import RunConfig
from mfdist.errors import ConfigError, MfdistError
from mfdist.launch import cluster, machine
from mfdist.launch.code_copy import expected_whole
from mfdist.launch.happenings import Ended
from mfdist.launch.pulse import Post, Pulse, settle


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A trainer's part in a group.

    Args:
        run: the run's folder.
        world_size: how many trainers; the post's index is the rank.
        meeting: HOST, PORT where rank 0 waits for the others.
        ranks_per_host: as training takes it to be.
        overrides: of the run's configuration, stored with it.
        servers: overrides for as long as these servers run.
    """

    run: str
    world_size: int
    meeting: tuple[str, int]
    ranks_per_host: int
    overrides: tuple[str, ...]
    servers: tuple[str, ...] = ()


class Trainer:
    """One rank. `meet`, then `train` once; both in the process's main thread."""

    def __init__(self, post: Post, supervisor: Any) -> None:
        settle(post)
        self._gpu = _own_gpu()
        self._host = cluster.own_address()
        self._pulse = Pulse(post, self._host, cluster.caller(supervisor, "beat"))

    def meet(self) -> tuple[str, int]:
        """Load what training needs; return this host's address and a port on it that is free.

        Raises:
            ConfigError: Ray has given this trainer a GPU that torch cannot use.
            UnavailableError: a part of this package is all that the host has.
        """
        with expected_whole(self._host):
            import mfdist.training.loop  # noqa: F401 - seconds, which all trainers spend at the same time

        _check_gpu(self._gpu, self._host)
        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as taken:
            taken.bind((self._host, 0))
            return self._host, taken.getsockname()[1]

    def train(self, assignment: Assignment) -> Ended:
        """Train until the end, or until SIGTERM or the supervisor asks to stop; return how it went."""
        post = self._pulse.post
        try:
            with expected_whole(self._host):
                stopped = self._train(assignment)
        except MfdistError as error:
            traceback.print_exc()
            return self._left("failed", error.kind, str(error))
        except Exception as error:  # noqa: BLE001 - told to the supervisor, which decides
            traceback.print_exc()
            return self._left("failed", "", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        self._pulse.finish()
        how = "finished" if stopped.reason == "finished" else "stopped"
        return Ended("trainer", post.index, post.incarnation, how, message=stopped.reason, step=stopped.step)  # type: ignore[arg-type]

    def _left(self, how: Any, kind: str, message: str) -> Ended:
        sys.stderr.flush()
        self._pulse.finish()
        return Ended("trainer", self._pulse.post.index, self._pulse.post.incarnation, how, kind, message)

    def _train(self, assignment: Assignment) -> Any:
        from mfdist.training.events import ignore
        from mfdist.training.loop import train
        from mfdist.training.run import RunDirectory
        from mfdist.training.world import joined

        _set_rank(self._pulse.post.index, self._gpu or 0, assignment, self._host)
        run = RunDirectory.open(assignment.run)
        overrides = (*assignment.overrides, *assignment.servers)
        config = run.config_with(overrides)
        with contextlib.ExitStack() as stack:
            home = None
            if config.servers.addresses and config.model.kind == "memory":
                from mfdist.table_server.run_tables import ServedTables

                home = stack.enter_context(contextlib.closing(ServedTables(config)))
                if config.servers.replicas > 1:
                    self._pulse.follow(home.move_to)
            world = stack.enter_context(joined(config))
            observer = self._pulse.observe if world.is_first else ignore
            stopped = train(run, overrides=overrides, observer=observer, table_home=home)
            if world.is_first and assignment.servers:  # which end with the job
                run.write_config(without_servers(run.config))
            return stopped


def _own_gpu() -> int | None:
    """Return which of the GPUs that this process sees is the one Ray gave it, once it sees all of its host's.

    Ray shows a trainer its own alone, and GPUs write into each other's memory where their processes see both.
    """
    own = cluster.own_gpus()
    if not own:
        return None
    shown, number = all_gpus(own, os.environ.get("CUDA_VISIBLE_DEVICES", ""), machine.num_gpus())
    if shown:
        os.environ["CUDA_VISIBLE_DEVICES"] = shown
    return number


def all_gpus(own: Sequence[str], shown: str, found: int) -> tuple[str, int]:
    """Return what CUDA_VISIBLE_DEVICES is to be, and the place in it of the GPU that Ray gave.

    Args:
        own: its ids, as Ray has them.
        shown: what CUDA_VISIBLE_DEVICES is.
        found: how many GPUs the host has. Where they are not simply numbered, as parts of GPUs are not, `shown` stays.
    """
    if list(own) == [shown] and shown.isdecimal() and int(shown) < found:
        return ",".join(map(str, range(found))), int(shown)
    listed = [each for each in shown.split(",") if each]
    if own[0] in listed:
        return shown, listed.index(own[0])
    # Nothing was narrowed for this actor, and it sees all NVIDIA GPUs; others' are shown by another variable.
    is_number = not listed and own[0].isdecimal() and int(own[0]) < found
    return shown, int(own[0]) if is_number else 0


def _check_gpu(gpu: int | None, host: str) -> None:
    """Refuse to train on the CPU of a host whose GPU was reserved, and take that GPU."""
    import torch

    if gpu is None:
        return
    if gpu < torch.cuda.device_count():
        torch.cuda.set_device(gpu)
    else:
        raise ConfigError(
            f"each trainer trains on the GPU that Ray gives it, number {gpu}; torch {torch.__version__} on {host} "
            f"finds {torch.cuda.device_count()} GPUs; install a CUDA build there, or --set training.device=cpu"
        )


def without_servers(config: RunConfig) -> RunConfig:
    """Return a run's configuration as it is when its job's table servers are gone."""
    forgotten = {"addresses": (), "token_file": None, "ca": None, "server_name": ""}
    return config.model_copy(update={"servers": config.servers.model_copy(update=forgotten)})


def _set_rank(rank: int, gpu: int, assignment: Assignment, host: str) -> None:
    """Say who this is, as torchrun would."""
    address, port = assignment.meeting
    settings = {
        "RANK": rank,
        "WORLD_SIZE": assignment.world_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "LOCAL_RANK": gpu,  # which is the device that training takes
        "LOCAL_WORLD_SIZE": assignment.ranks_per_host,
    }
    if interface := interface_of(host):
        settings |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    os.environ.update({name: str(value) for name, value in settings.items()})


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address of this host; loopback's for all of 127."""
    if address.startswith("127."):
        address = "127.0.0.1"
    return next(
        (
            str(name)
            for name, entries in psutil.net_if_addrs().items()
            if any(entry.address.partition("%")[0] == address for entry in entries)
        ),
        None,
    )

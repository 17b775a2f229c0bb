"""The door to Ray: clusters, their hosts, actors and where these are placed.

Clusters that mfdist starts are in `local_cluster`; others are joined as Ray's own settings say.

`ray._private` is used where Ray 2.60 has nothing public: `ray.nodes()` knows neither what is free on a host nor which
hosts drain, `ray.util.state` knows the former by way of a dashboard that need not run, and nothing else resolves
`auto`, or keeps what Ray prints off stdout.
"""

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import mfdist
from mfdist.errors import ConfigError, InternalError, UnavailableError
from mfdist.launch.code_copy import copy_of_code
from mfdist.launch.head_port import check_head
from mfdist.launch.job import ClusterAddress

NAMESPACE = "mfdist"
_HEAD_RESOURCE = "node:__internal_head__"  # Ray gives every head one of it

#: How Ray says that versions differ.
_VERSIONS = re.compile(r"Version mismatch.*?Ray: (\S+)\s+Python: (\S+).*?Ray: (\S+)\s+Python: (\S+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host of a cluster."""

    node_id: str
    address: str
    cpus: float
    gpus: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What an actor needs of its host."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0

    def bundle(self) -> dict[str, float]:
        """Return it as Ray's resources."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in wanted.items() if amount}


def check_installed(what: str = "mfdist launch") -> None:
    """Raise ConfigError where Ray is not there, which `what` needs."""
    try:
        metadata.version("ray")
    except metadata.PackageNotFoundError:
        raise ConfigError(f"{what} needs Ray; pip install 'mfdist[ray]'") from None


@contextlib.contextmanager
def joined_cluster(cluster: ClusterAddress, *, ships_code: bool = False) -> Iterator[None]:
    """Be part of a cluster while the body runs.

    Args:
        cluster: which.
        ships_code: whether this package travels to its hosts; they need its dependencies installed, not itself.

    Raises:
        ConfigError: something other than Ray is there.
        UnavailableError: nothing answers, it is another Ray or has another token, or no node of it is on this host.
    """
    if cluster.token_file:  # Ray reads it once in a process
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster.token_file})
    import ray
    import ray._private.worker

    # What befalls a cluster would be printed on stdout, stack traces of its daemons included; the supervisor tells it.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    check_head(cluster.address)
    with copy_of_code() if ships_code else contextlib.nullcontext() as code:
        try:
            ray.init(
                address=cluster.address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                runtime_env=None if code is None else {"working_dir": code},
            )
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            raise UnavailableError(f"a Ray cluster must be joined at {cluster.address}; {_why_not(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def find_address(address: str) -> ClusterAddress:
    """Return the cluster that `--address` means: HOST:PORT, or auto for the one that this host is part of.

    Raises:
        UnavailableError: auto, and there is none.
    """
    if address != "auto":
        return ClusterAddress(address=address)
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except (ConnectionError, RuntimeError) as error:
        raise UnavailableError(f"--address auto needs a Ray node on this host; {_first_line(error)}") from None
    return ClusterAddress(address=str(found))


def hosts() -> list[Host]:
    """Return the hosts of the joined cluster that are alive."""
    import ray

    return [
        Host(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory_bytes=int(node["Resources"].get("memory", 0.0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def ask_hosts(function: Callable[..., Any], *args: Any, timeout_s: float) -> list[tuple[Host, Any, str]]:
    """Return what a function returns on each host, or why it returned nothing.

    Args:
        function: of a module that imports nothing but Python's own, for it travels with its module.
        args: of it.
        timeout_s: for all of them together.

    Returns:
        (host, result, "") or (host, None, reason) for each.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    until = time.monotonic() + timeout_s
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        asked = [
            (
                host,
                ray.remote(function)
                .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False))
                .remote(*args),
            )
            for host in hosts()
        ]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    answers: list[tuple[Host, Any, str]] = []
    for host, reference in asked:
        try:
            answers.append((host, answer(reference, max(0.1, until - time.monotonic())), ""))
        except mfdist.errors.MfdistError as error:
            answers.append((host, None, str(error)))
    return answers


def draining_hosts() -> tuple[str, ...]:
    """Return the addresses of hosts that are about to go, as after SIGTERM to their Ray."""
    import ray

    known = ray._private.state.state.get_draining_nodes()
    return tuple(sorted(host.address for host in hosts() if host.node_id in known))


def free_places(reserved: Reserved) -> int:
    """Return how many actors of a kind have place now."""
    import ray

    bundle = reserved.bundle()
    return sum(
        int(min(free.get(name, 0.0) / amount for name, amount in bundle.items()) + 1e-6)
        for free in ray._private.state.available_resources_per_node().values()
    )


class Places:
    """Reserved places for actors in the cluster, made by whoever uses them and gone with it.

    Args:
        name: of them in the cluster, never used before.
        reserved: of each.
        number: how many.
        apart: whether they must, or may as far as there are hosts, be on one host each; no: on as few as possible.
    """

    def __init__(
        self, name: str, reserved: Reserved, number: int, *, apart: Literal["must", "may", "no"] = "no"
    ) -> None:
        from ray.util import placement_group

        strategy = {"must": "STRICT_SPREAD", "may": "SPREAD", "no": "PACK"}[apart]
        self._group = placement_group([reserved.bundle()] * number, strategy=strategy, name=name)
        self._ready = self._group.ready()

    def are_ready(self) -> bool:
        """Return whether all are there."""
        return is_done(self._ready)

    def by_host(self) -> list[int]:
        """Return the numbers of the places, those of a host together."""
        from ray.util import placement_group_table

        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return sorted(nodes, key=lambda index: (nodes[index], index))

    def strategy(self, index: int) -> Any:
        """Return what puts an actor on a place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)

    def give_back(self) -> None:
        """Let the places go, and end what runs on them."""
        from ray.util import remove_placement_group

        remove_placement_group(self._group)


def take_away_places(prefix: str) -> None:
    """Let all places go whose name begins so: an earlier holder that died did not give them back."""
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    for found in placement_group_table().values():
        if found["name"].startswith(prefix) and found["state"] != "REMOVED":
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(found["name"]))


def start_actor(kind: type, *args: Any, name: str, reserved: Reserved, places: Places, index: int) -> Any:
    """Start an actor on a place and return its handle; it ends with whoever started it, and never by itself again."""
    import ray

    options = {
        "name": name,
        "num_cpus": reserved.cpus,
        "num_gpus": reserved.gpus,
        "memory": reserved.memory_bytes or None,
        "max_restarts": 0,
        "scheduling_strategy": places.strategy(index),
    }
    return ray.remote(kind).options(**options).remote(*args)


def start_supervisor(kind: type, *args: Any, name: str) -> Any:
    """Start an actor beside the head that outlives whoever started it, and is started again when it dies."""
    import ray

    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "resources": {_HEAD_RESOURCE: 0.001},
        "max_restarts": -1,
        "max_concurrency": 64,
    }
    return ray.remote(kind).options(**options).remote(*args)


def find_actor(name: str) -> Any:
    """Return the handle of a named actor.

    Raises:
        UnavailableError: there is none.
    """
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise UnavailableError(f"the cluster has no actor {name}; it has ended") from None


def own_handle() -> Any:
    """Return the handle of the actor that this process is."""
    import ray

    return ray.get_runtime_context().current_actor


def own_address() -> str:
    """Return this host's address as the cluster knows it."""
    import ray

    return str(ray.util.get_node_ip_address())


def own_gpus() -> list[str]:
    """Return the GPUs that the cluster has given to this actor."""
    import ray

    return [str(gpu) for gpu in ray.get_gpu_ids()]


def end_actor(handle: Any) -> None:
    """End an actor at once, for good."""
    import ray

    with contextlib.suppress(ValueError, RuntimeError):
        ray.kill(handle, no_restart=True)


def is_done(reference: Any) -> bool:
    """Return whether a call has come to something."""
    import ray

    return bool(ray.wait([reference], timeout=0, fetch_local=False)[0])


def answer(reference: Any, timeout_s: float) -> Any:
    """Return what a call came to.

    Raises:
        UnavailableError: the actor has died, or did not answer in time; the message says which.
        InternalError: it raised something that is no MfdistError.
        MfdistError: it raised that.
    """
    import ray
    from ray import exceptions

    try:
        return ray.get(reference, timeout=timeout_s)
    except exceptions.GetTimeoutError:
        raise UnavailableError(f"no answer within {timeout_s:g} s") from None
    except exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, mfdist.errors.MfdistError):
            raise cause from None
        raise InternalError(str(error)) from None
    except exceptions.RayError as error:
        raise UnavailableError(_death(error)) from None


def caller(handle: Any, method: str) -> Callable[..., Any]:
    """Return a function that calls an actor's method and waits for the answer; its first argument is for how long."""

    def call(timeout_s: float, *args: Any) -> Any:
        return answer(getattr(handle, method).remote(*args), timeout_s)

    return call


def _death(error: Exception) -> str:
    """Return Ray's long account of a death in a line."""
    text = " ".join(str(error).split())
    for known, said in (
        ("SIGKILL", "its process was killed"),
        ("connection error code 2", "its process ended unexpectedly (killed, or out of memory)"),
        ("node is dead", "its host is gone"),
        ("node died", "its host is gone"),
        ("node has died", "its host is gone"),
        ("ray.kill", "it was ended"),
        ("temporarily unavailable", "its connection broke"),
        ("died unexpectedly", "its process is gone"),
    ):
        if known in text:
            return said
    return text[:300]


def _why_not(error: Exception) -> str:
    """Return in a line why Ray could not join a cluster that answers."""
    if versions := _VERSIONS.search(str(error)):
        theirs, their_python, ours, our_python = versions.groups()
        return (
            f"every host must run one version of Ray and of Python; the cluster has Ray {theirs} and Python "
            f"{their_python}, this host Ray {ours} and Python {our_python}; pip install 'ray=={theirs}' here, or start "
            "the cluster anew from this environment"
        )
    if isinstance(error, ConnectionError):  # Ray tells a refused token on stderr alone
        return (
            "the cluster answers but lets this host not in; RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or the file "
            "~/.ray/auth_token, must be what its head was started with"
        )
    return f"a node of the cluster must run on this host; {_first_line(error)}; see ray start --address"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""A Ray cluster with a node in each of several hosts; the first is the head.

    with Hosts(3) as hosts, RayNodes(hosts) as nodes:
        hosts[0].run(["ray", "status"], env=nodes.environment)
        nodes.lose(2)
        nodes.start(2)            # as after a boot

Needs `ray`; the hosts may be those of `hosts.py` or of `loopback_hosts.py`.
"""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

_PORT = 6379
_UP_S = 180.0
_OBJECT_STORE_BYTES = 128 << 20
#: How soon the head knows of a host that died: a second between checks, five missed. Ray's own take 16 s.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
#: Run in the head's host, which may be the only one that reaches it.
_WAIT = """
import sys, time
from ray._raylet import GcsClient
address, number, until = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
found = None
while found != number:
    if time.monotonic() > until:
        sys.exit(f"{found} are")
    try:
        found = sum(node.state == 0 for node in GcsClient(address=address).get_all_node_info(timeout=5).values())
    except Exception as error:
        found = error
    time.sleep(0.2)
"""


class _Host(Protocol):
    """What a node needs of its host."""

    name: str
    address: str

    def start(self, arguments: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]": ...
    def run(
        self, arguments: Sequence[str], *, timeout_s: float = ..., env: Mapping[str, str] | None = ...
    ) -> "subprocess.CompletedProcess[str]": ...
    def kill(self) -> None: ...


class _Hosts(Protocol):
    """Several of them, and a folder for their files."""

    folder: Path

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Host]: ...
    def __getitem__(self, index: int) -> _Host: ...


class RayNodes:
    """A Ray node in each host from entry to exit of the hosts, which end it; each has the resource of its host's name.

    Args:
        hosts: the first is the head's.
        cpus, gpus: how many each host says it has.
        environment: variables for all nodes, and so for what runs in them.
        of_host: more of them for the node of a host, by its index.

    Attributes:
        environment: what a driver or a command in one of the hosts needs: the cluster's address and token.
    """

    def __init__(
        self,
        hosts: "_Hosts",
        *,
        cpus: int = 4,
        gpus: int = 0,
        environment: Mapping[str, str] | None = None,
        of_host: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        self.address = f"{hosts[0].address}:{_PORT}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            **HEALTH_CHECKS,
            **(environment or {}),
        }
        self._hosts, self._cpus, self._gpus, self._of_host = hosts, cpus, gpus, of_host or {}
        self._processes: dict[int, subprocess.Popen[Any]] = {}

    def __enter__(self) -> Self:
        self.start(0)
        self.wait_for(1)
        for index in range(1, len(self._hosts)):
            self.start(index)
        self.wait_for(len(self._hosts))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def start(self, index: int) -> None:
        """Start the node of a host, which may be one that was killed; `wait_for` says when it is up."""
        host = self._hosts[index]
        place = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"] if index == 0 else [f"--address={self.address}"]
        )
        free_ports = [
            f"--{name}=0"
            for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        ]
        arguments = [
            *("ray", "start", "--block", "--disable-usage-stats", "--include-log-monitor=false", *place, *free_ports),
            *(f"--node-ip-address={host.address}", f"--num-cpus={self._cpus}", f"--num-gpus={self._gpus}"),
            *(f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={self._hosts.folder}/ray-{host.name}"),
            f'--resources={{"{host.name}": 1}}',
        ]
        environment = {**self.environment, **self._of_host.get(index, {})}
        del environment["RAY_ADDRESS"]  # it would be the address to join, of the head too
        with self._log(host).open("wb") as log:
            self._processes[index] = host.start(
                arguments,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is meant for a driver
            )

    def lose(self, index: int) -> None:
        """Kill a host with its node, which stays away until it is started again."""
        del self._processes[index]
        self._hosts[index].kill()

    def revive(self) -> list[int]:
        """Start the nodes whose process ended by itself, as systemd would, and return whose they were."""
        ended = [index for index, process in self._processes.items() if process.poll() is not None]
        for index in ended:
            self._hosts[index].kill()  # what a node leaves goes with it
            self.start(index)
        return ended

    def wait_for(self, number: int) -> None:
        """Return once the head knows of `number` living nodes, and no fewer or more.

        Raises:
            TimeoutError: it never did.
        """
        done = self._hosts[0].run(
            [sys.executable, "-c", _WAIT, self.address, str(number), str(_UP_S)],
            timeout_s=_UP_S + 60,
            env=self.environment,
        )
        if done.returncode:
            said = "\n".join(
                self._log(host).read_text("utf-8", errors="replace") for host in self._hosts if self._log(host).exists()
            )
            raise TimeoutError(f"{number} nodes must be up within {_UP_S} s; {done.stderr[-2000:]}\n{said}")

    def _log(self, host: _Host) -> Path:
        return self._hosts.folder / f"ray-{host.name}.log"

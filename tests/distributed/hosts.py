"""Several hosts on one machine: network namespaces joined by a bridge, with a name, an address and a link each.

    with Hosts(3) as hosts:
        hosts[0].run(["python", "-c", "import socket; print(socket.gethostname())"])
        with hosts[1].cut():
            ...                   # what hosts[1] sends or is sent is lost
        hosts[2].kill()           # every process of that host, by SIGKILL

From a shell, for trying things by hand; without a command the hosts stay until Ctrl-C:

    python tests/distributed/hosts.py --hosts 3 -- ip -br address
    python tests/distributed/hosts.py --hosts 3 --ray -- ray status

Hosts see each other and nothing else; their bridge lies in a namespace of its own, so the machine's own network has no
part in it. They share the machine's files and processor. Needs root, iproute2 and a kernel with namespaces: `why_not()`
says what is missing.
"""

import argparse
import contextlib
import fcntl
import ipaddress
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

#: A range that no network routes (RFC 2544), so that no mistake reaches a real machine.
_NETWORK = ipaddress.ip_network("198.18.0.0/24")
#: Short, because Ray's unix sockets lie below it and their paths may have 107 characters.
_FOLDERS = Path("/tmp")
_PREFIX = "mfhosts-"
_OURS = re.compile(rf"{_PREFIX}([0-9a-z_]{{8}})(-\w+)?")
_DEADLINE_S = 60.0
_ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class HostsError(RuntimeError):
    """A command that sets up or changes hosts failed; what there was is taken down."""


class Host:
    """One of several `Hosts`: a network namespace with one link to the others."""

    def __init__(self, hosts: "Hosts", index: int) -> None:
        self.index = index
        self.name = f"host{index}"
        self.address = str(_NETWORK[index + 1])
        self.namespace = f"{hosts.token}-{self.name}"
        self._hosts = hosts

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` in this host; its process becomes theirs, pid and all."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-ec", _ENTER, "sh"]
        return [*enter, self.name, str(self._hosts.folder / "hosts"), *arguments]

    def start(self, arguments: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a process in this host; it ends with the hosts at the latest."""
        process = subprocess.Popen(self.command(arguments), **popen)
        self._hosts.started.append(process)
        return process

    def run(
        self, arguments: Sequence[str], *, timeout_s: float = _DEADLINE_S, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in this host to its end; return its output and exit code, whatever that is."""
        return subprocess.run(self.command(arguments), capture_output=True, text=True, timeout=timeout_s, env=env)

    def pids(self) -> list[int]:
        """Return every process of this host, started here or by one that was."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Send every process SIGKILL until none is left; what is started next is started after a boot.

        Connections are closed, as a living kernel does for its dead processes; where `cut` holds, nobody hears of it.
        """
        _kill_all(self.namespace)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Lose all that this host sends and is sent, as a switch that died between would: nobody is told."""
        _ip("-n", self._hosts.switch, "link", "set", self.name, "nomaster")
        try:
            yield
        finally:
            _ip("-n", self._hosts.switch, "link", "set", self.name, "master", "bridge")

    @contextlib.contextmanager
    def slowed(self, kib_per_s: int, delay_ms: int = 0) -> Iterator[str]:
        """Let no more than this through the host's link each way; yields what does it, "netem" or "tbf".

        Args:
            kib_per_s: KiB a second.
            delay_ms: beside that for each packet; only with netem.

        Raises:
            HostsError: the kernel has neither.
        """
        rate = f"{kib_per_s * 8192}bit"
        disciplines = {
            "netem": ["netem", "rate", rate, *(["delay", f"{delay_ms}ms"] if delay_ms else [])],
            "tbf": ["tbf", "rate", rate, "burst", "32kb", "latency", "2s"],
        }
        ends = ((self.namespace, "eth0"), (self._hosts.switch, self.name))
        found = next((name for name, words in disciplines.items() if _is_accepted(self.namespace, words)), None)
        if found is None:
            raise HostsError("this kernel has neither netem nor tbf; links cannot be slowed")
        for namespace, device in ends:
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *disciplines[found])
        try:
            yield found
        finally:
            for namespace, device in ends:
                _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")


class Hosts(Sequence[Host]):
    """`number` hosts that are there from entry to exit, and whatever was left by runs that were killed is not.

    Attributes:
        folder: with a short path, for what the hosts need; removed on exit.
    """

    def __init__(self, number: int) -> None:
        if not 1 <= number <= _NETWORK.num_addresses - 2:
            raise ValueError(f"there can be 1 to {_NETWORK.num_addresses - 2} hosts; got {number}")
        self.number = number
        self.token = ""
        self.folder = Path()
        self.started: list[subprocess.Popen[Any]] = []
        self._hosts: list[Host] = []
        self._lock = -1

    @property
    def switch(self) -> str:
        """The namespace of the bridge."""
        return f"{self.token}-switch"

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> Host:  # type: ignore[override]
        return self._hosts[index]

    def __enter__(self) -> Self:
        with _alone():
            _sweep()
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_FOLDERS))
            self.token = self.folder.name
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # as long as it is held, nobody sweeps what has this token
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything in the hosts and take them down; done twice, it does no more."""
        if self._lock < 0:
            return
        with _alone():
            _remove(self.token)
            os.close(self._lock)
            self._lock = -1
        for process in self.started:
            process.wait(_DEADLINE_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._hosts = []

    def _build(self) -> None:
        self._hosts = [Host(self, index) for index in range(self.number)]
        names = "".join(f"{host.address} {host.name}\n" for host in self)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", "ascii")
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for host in self:
            _ip("netns", "add", host.namespace)
            peer = ("peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", self.switch, "link", "add", host.name, "type", "veth", *peer)
            _ip("-n", self.switch, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/{_NETWORK.prefixlen}", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")


def why_not() -> str | None:
    """Return why this machine can have no hosts, in words for a skipped test; None where it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in ("ip", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt install iproute2)"
    try:
        with Hosts(1) as hosts:
            done = hosts[0].run(["true"])
    except HostsError as error:
        return str(error)
    return None if done.returncode == 0 else f"a namespace cannot be entered: {done.stderr.strip()}"


def _sweep() -> None:
    """Remove what runs left that were killed; those that live hold a lock."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    names += [path.name for path in _FOLDERS.glob(f"{_PREFIX}*")]
    for token in {f"{_PREFIX}{match[1]}" for name in names if (match := _OURS.fullmatch(name))}:
        if not _is_locked(_FOLDERS / token):
            _remove(token)


def _is_locked(folder: Path) -> bool:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _remove(token: str) -> None:
    for line in _ip("netns", "list").splitlines():
        name = line.partition(" ")[0]
        if name.startswith(f"{token}-"):
            _kill_all(name)
            _ip("netns", "delete", name)  # its devices and their other ends go with it
    shutil.rmtree(_FOLDERS / token, ignore_errors=True)


def _kill_all(namespace: str) -> None:
    until = time.monotonic() + _DEADLINE_S
    while pids := _ip("netns", "pids", namespace).split():  # again, for what was being forked
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > until:
            raise HostsError(f"all processes of {namespace} must end within {_DEADLINE_S} s; left: {pids}")
        time.sleep(0.01)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep two runs from making and sweeping at once."""
    with (_FOLDERS / f"{_PREFIX}hosts.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_accepted(namespace: str, discipline: Sequence[str]) -> bool:
    command = ["tc", "-n", namespace, "qdisc", "replace", "dev", "eth0", "root", *discipline]
    return subprocess.run(command, capture_output=True, timeout=_DEADLINE_S).returncode == 0


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_DEADLINE_S).stdout
    except subprocess.CalledProcessError as error:
        raise HostsError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command in hosts, or keep them for somebody to try things in; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="hosts.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--everywhere", action="store_true", help="run the command in every host, not in host0 alone")
    parser.add_argument("--ray", action="store_true", help="start a Ray node in each first; the head is host0")
    parser.add_argument("command", nargs="*", help="after --; without one, the hosts stay until Ctrl-C")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        print(f"hosts.py: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Hosts(options.hosts))
        environment = dict(os.environ)
        if options.ray:
            sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
            from tests.distributed.ray_nodes import RayNodes

            environment |= stack.enter_context(RayNodes(hosts)).environment
        try:
            if options.command:
                chosen = list(hosts) if options.everywhere else [hosts[0]]
                return _run_in(chosen, options.command, environment)
            for host in hosts:
                print(f"{host.name} {host.address}: nsenter --net=/run/netns/{host.namespace}")
            print("Ctrl-C takes them down.", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            pass
    return 130


def _run_in(hosts: Sequence[Host], command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in hosts at once; several say whose line each is. Return the first exit code that is not 0."""
    if len(hosts) == 1:
        return int(hosts[0].start(command, env=environment).wait())
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [host.start(command, env=environment, **output) for host in hosts]
    threads = [
        threading.Thread(target=_copy, args=(host.name, process.stdout))
        for host, process in zip(hosts, processes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((code for process in processes if (code := process.wait())), 0)


def _copy(name: str, lines: IO[str]) -> None:
    for line in lines:
        print(f"{name}: {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())

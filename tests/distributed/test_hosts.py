"""Hosts of network namespaces do what tests that use them count on: links, cuts, slowness, deaths, and no remains."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed import hosts as hosts_module
from tests.distributed.hosts import Host, Hosts, HostsError
from tests.distributed.loopback_hosts import LoopbackHosts

#: A server that sends back how many bytes each connection brought, and says its port in the file argv[2].
SINK = """
import socket, sys, os
server = socket.create_server((sys.argv[1], 0))
open(sys.argv[2] + "~", "w").write(str(server.getsockname()[1]))
os.rename(sys.argv[2] + "~", sys.argv[2])
while True:
    connection, _ = server.accept()
    size = 0
    while received := connection.recv(65536):
        size += len(received)
    connection.sendall(str(size).encode())
    connection.close()
"""

#: Sends argv[3] bytes there, prints the answer and how long it took.
SOURCE = """
import socket, sys, time
start = time.monotonic()
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[4])) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
    connection.shutdown(socket.SHUT_WR)
    print(connection.recv(100).decode(), time.monotonic() - start)
"""


@pytest.fixture(scope="module")
def three(namespaces: None) -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until something is true, for half a minute."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, f"it never came to that {what}"
        time.sleep(0.01)


def listening(host: Host, file: Path) -> int:
    """Start a sink in a host; return its port."""
    host.start([sys.executable, "-c", SINK, host.address, str(file)])
    until(file.exists, "the server listens")
    return int(file.read_text())


def send(source: Host, to: Host, port: int, size: int = 1, timeout_s: float = 30) -> tuple[int, float] | str:
    """Send bytes from a host to a sink; return (bytes that came, seconds), or what went wrong."""
    arguments = [sys.executable, "-c", SOURCE, to.address, str(port), str(size), str(timeout_s)]
    done = source.run(arguments, timeout_s=timeout_s + 30)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    came, took = done.stdout.split()
    return int(came), float(took)


def test_hosts_reach_each_other_and_the_machine_reaches_none(three: Hosts, tmp_path: Path) -> None:
    port = listening(three[1], tmp_path / "port")
    for host in three:
        answer = send(host, three[1], port, 100_000)
        assert answer[0] == 100_000, answer
    look = "import socket; print(socket.gethostname(), socket.gethostbyname('host2'))"
    assert three[0].run([sys.executable, "-c", look]).stdout == "host0 198.18.0.3\n"
    ours = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout
    assert "198.18." not in ours
    assert three[0].run(["ip", "route"]).stdout.count("\n") == 1, "there is a way out"


def test_what_is_sent_while_a_link_is_cut_is_lost(three: Hosts, tmp_path: Path) -> None:
    port = listening(three[1], tmp_path / "port")
    with three[1].cut():
        assert "timed out" in str(send(three[0], three[1], port, timeout_s=1))
        assert "198.18.0.2" in three[1].run(["ip", "address"]).stdout, "the host itself knows of nothing"
    assert send(three[0], three[1], port, 1000)[0] == 1000


def test_a_slowed_link_lets_no_more_through(three: Hosts, tmp_path: Path) -> None:
    port = listening(three[2], tmp_path / "port")
    try:
        with three[2].slowed(128) as by:
            came, took = send(three[0], three[2], port, 256 << 10)
            assert by in ("netem", "tbf")
    except HostsError as error:
        pytest.skip(str(error))
    assert came == 256 << 10
    assert took > 1  # half of the time at that rate, for what buffers hold
    assert "tbf" not in three[2].run(["tc", "qdisc"]).stdout


def test_a_killed_host_has_no_process_and_can_start_others(three: Hosts, tmp_path: Path) -> None:
    listening(three[1], tmp_path / "first")
    child = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    three[1].start([sys.executable, "-c", child])
    until(lambda: len(three[1].pids()) >= 3, "its processes are up")
    three[1].kill()
    assert three[1].pids() == []
    port = listening(three[1], tmp_path / "second")
    assert send(three[0], three[1], port)[0] == 1


@pytest.mark.usefixtures("namespaces")
def test_nothing_is_left_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Hosts(2) as hosts:
        token, folder = hosts.token, hosts.folder
        process = hosts[0].start(["sleep", "600"])
        _ = 1 / 0
    assert process.returncode == -signal.SIGKILL
    assert token not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not folder.exists()


def test_what_a_killed_run_left_is_swept_by_the_next_and_what_lives_is_not(three: Hosts) -> None:
    script = [sys.executable, hosts_module.__file__, "--hosts", "2", "--", "sh", "-c", "echo $$; exec sleep 600"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        left = int(run.stdout.readline())
        run.kill()
    assert Path(f"/proc/{left}").exists(), "there must be something to sweep"
    with Hosts(1):
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    until(lambda: not Path(f"/proc/{left}").exists(), "it ends")
    assert {name.split("-")[1] for name in names.split() if name.startswith("mfhosts-")} >= {three.token.split("-")[1]}
    assert three[0].run(["true"]).returncode == 0


@pytest.mark.usefixtures("namespaces")
def test_a_command_runs_in_every_host_and_its_exit_code_comes_back() -> None:
    script = [sys.executable, hosts_module.__file__, "--hosts", "2", "--everywhere", "--", "sh", "-c"]
    done = subprocess.run([*script, "hostname; test $(hostname) = host0"], capture_output=True, text=True, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["host0: host0", "host1: host1"]
    assert done.returncode == 1


def test_help_says_how() -> None:
    script = [sys.executable, hosts_module.__file__, "--help"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--everywhere" in done.stdout


def test_hosts_of_loopback_know_their_processes() -> None:
    with LoopbackHosts(2) as hosts:
        for host in hosts:
            host.start(["sh", "-c", "sleep 600 & exec sleep 600"])
        until(lambda: [len(host.pids()) for host in hosts] == [2, 2], "their processes are up")
        other = hosts[1].pids()
        hosts[0].kill()
        assert (hosts[0].pids(), hosts[1].pids()) == ([], other)
    until(lambda: not Path(f"/proc/{other[0]}").exists(), "it ends")

"""`mfdist top` against real servers."""

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from mfdist.launch.cli.top_view import shown
from mfdist.launch.server_rates import server_rates, table_rates
from mfdist.table_server.auth import new_token
from mfdist.table_server.certificates import init_tls
from mfdist.table_server.channel import client_channel
from mfdist.table_server.metrics import Observed, TableFigures
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.sections import SecurityConfig
from mfdist.table_server.watching import look
from tests.table_server.served import Config, Served, serving

FIGURES = TableFigures(name="words", version=9, num_rows=200, num_bytes=51_200, row_hits=77, saved_version=4)
OBSERVED = Observed(tables=lambda: [FIGURES], queue_depth=lambda: 2.0, log_bytes=lambda: 4096.0)


@pytest.fixture
def busy() -> Iterator[Served]:
    """Return a server that is asked something all the time."""
    done = threading.Event()

    def ask() -> None:
        with grpc.insecure_channel(served.address) as channel:
            stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
            while not done.is_set():
                stub.Barrier(pb.BarrierRequest(), timeout=10)
                list(stub.Lookup(iter([pb.LookupRequest()]), timeout=10))
                time.sleep(0.005)

    with serving(observed=OBSERVED) as served:
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield served
        finally:
            done.set()
            thread.join(20)


def test_one_look_as_json(mfdist, busy):
    code, out, _ = mfdist("top", busy.address, "--once", "--json", "--interval", "0.5")
    assert code == 0
    document = json.loads(out)
    [server], [table] = document["servers"], document["tables"]
    assert (server["address"], server["state"], server["problem"]) == (busy.address, "serving", None)
    assert server["requests_per_s"] > 1
    assert server["errors_per_s"] == 0
    assert (server["queue_depth"], server["log_bytes"]) == (2, 4096)
    assert 0 < server["latency_s"]["Lookup"]["p50"] <= server["latency_s"]["Lookup"]["p99"]
    assert (table["table"], table["num_rows"], table["row_dim"]) == ("words", 200, 64)
    assert table["updates_per_s"] > 1
    assert (table["row_hits"], table["checkpoint_lag"]) == (77, 5)


def test_one_look_for_people(mfdist, busy):
    code, out, _ = mfdist("top", busy.address, "--once", "--interval", "0.2")
    assert code == 0
    assert busy.address in out
    assert "serving" in out
    assert "words" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("width", [20, 60, 80, 120, 250])
def test_what_has_no_room_is_left_out_and_nothing_is_cut(busy, width):
    async def looks():
        async with client_channel(busy.address) as channel:
            return [await look(busy.address, channel, 10) for _ in range(2)]

    before, now = asyncio.run(looks())
    stream = io.StringIO()
    Console(file=stream, width=width).print(shown([server_rates(before, now)], table_rates(before, now)))
    head, row, _, _, table = stream.getvalue().rstrip("\n").split("\n")
    assert all(len(line) <= width for line in (head, row, table))
    assert row.startswith(busy.address)
    assert "…" not in stream.getvalue()
    assert len(head.split()) >= width // 20
    assert ("memory" in head) == (width == 250)


def test_a_server_that_does_not_answer_is_named_and_the_others_are_shown(mfdist, busy):
    code, out, _ = mfdist("top", busy.address, "127.0.0.1:1", "--once", "--json", "--interval", "0.2")
    assert code == 1
    servers = json.loads(out)["servers"]
    assert [server["state"] for server in servers] == ["serving", "unreachable"]
    assert "127.0.0.1:1" in servers[1]["problem"]
    code, out, _ = mfdist("top", "127.0.0.1:1", "--once", "--interval", "0.2")
    assert code == 1
    assert "unreachable" in out


def test_behind_tls_and_tokens(mfdist, tmp_path):
    folder = tmp_path / "tls"
    init_tls(folder)
    security = SecurityConfig(
        certificate=folder / "server.pem",
        private_key=folder / "server.key",
        client_ca=folder / "ca.pem",
        token_file=folder / "tokens.toml",
    )
    trust = ["--tls-ca", folder / "ca.pem", "--tls-cert", folder / "client.pem", "--tls-key", folder / "client.key"]
    with serving(Config(security=security), OBSERVED) as served:
        arguments = ["top", served.address, "--once", "--json", "--interval", "0.2", *map(str, trust)]
        code, out, _ = mfdist(*arguments, "--token-file", str(folder / "reader.token"))
        assert code == 0
        assert json.loads(out)["servers"][0]["state"] == "serving"
        code, out, _ = mfdist(*arguments)
        assert code == 1
        assert "needs a token" in json.loads(out)["servers"][0]["problem"]
        other = folder / "pusher.token"
        other.touch(0o600)
        other.write_text(new_token(tmp_path / "others.toml", "x", ["push"]), "ascii")
        code, out, err = mfdist(*arguments, "--token-file", str(other))
        assert code == 1
        assert other.read_text("ascii") not in out + err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["10.0.0.7:7070"], "reached by TLS unless it is on loopback"),
        (["nonsense"], "HOST:PORT"),
        (["127.0.0.1:1", "--tls-cert", "a.pem"], "--tls-cert and --tls-key must be given together"),
        (["127.0.0.1:1", "--token-file", "missing"], "missing: No such file"),
    ],
)
def test_misuse(mfdist, arguments, says):
    code, out, err = mfdist("top", *arguments, "--once")
    assert code == 2
    assert says in err
    assert out == ""


def test_live_in_a_terminal_until_ctrl_c(busy):
    """The picture is drawn again and again in place, and the terminal is given back."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "mfdist", "top", busy.address, "--interval", "0.2"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, cwd=root, env=environment, start_new_session=True
    )
    os.close(follower)
    seen = b""
    try:
        end = time.monotonic() + 60
        while seen.count(b"words") < 4:
            assert time.monotonic() < end, seen[-2000:]
            seen += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(30)
        os.close(leader)
    assert b"serving" in seen
    assert seen.rstrip().endswith(b"\x1b[?25h") or seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h")
    assert b"Traceback" not in seen

"""`mfdist serve` as an operator runs it: closed by default, seen from outside, ended in order."""

import asyncio
import json
import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.table_server.channel import ChannelConfig, client_channel
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.watching import Seen, look
from tests.table_server.pairs import PLAN, step
from tests.table_server.training import OPTIMIZER

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which `mfdist serve --init-tls` was run."""
    folder = tmp_path_factory.mktemp("operator")
    done = run(folder, "--init-tls", "tls")
    assert done.returncode == 0, done.stderr
    assert "mfdist serve --tls tls" in done.stdout
    return folder


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mfdist", "serve", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S)


@contextmanager
def running(folder: Path, config: str, arguments: Sequence[str]) -> Iterator[tuple[dict[str, Any], Path]]:
    """Run a server; yield what it said first, and the file of its stderr."""
    (folder / "server.toml").write_text(config, "utf-8")
    command = [sys.executable, "-m", "mfdist", "serve", "server.toml", "--data", "data", "--json", *arguments]
    log = folder / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text("utf-8")
        yield json.loads(line), log
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0, log.read_text("utf-8")
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def seen(address: str, channel: ChannelConfig) -> Seen:
    async def once() -> Seen:
        async with client_channel(address, channel) as connected:
            return await look(address, connected, DEADLINE_S)

    return asyncio.run(once())


def test_a_missing_certificate_is_named_in_one_line(folder: Path) -> None:
    done = run(folder, "--data", "untouched", "--tls", "missing")
    assert done.returncode == 2
    assert done.stderr.startswith("mfdist: the token file must be readable; missing/tokens.toml: No such file")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


CONFIG = """
[limits]
requests_per_s = 500

[logs]
format = "json"
level = "debug"
"""


def test_a_closed_server_from_its_first_line_to_its_last(folder: Path) -> None:
    tls = folder / "tls"
    secrets = [path.read_text("ascii").strip() for path in tls.glob("*.token")]
    admin, reader, nobody = (
        ChannelConfig(ca=tls / "ca.pem", token_file=token)
        for token in (tls / "admin.token", tls / "reader.token", None)
    )
    arguments = ["--tls", "tls", "--listen", "0.0.0.0:0", "--metrics", "127.0.0.1:0"]
    with running(folder, CONFIG, arguments) as (said, log):
        address = f"127.0.0.1:{said['address'].rpartition(':')[2]}"
        with TableServers([address], channel=admin, deadline_s=DEADLINE_S) as servers:
            [description] = servers.describe()
            assert description.epoch == 1
        with pytest.raises(ConfigError, match="needs a token"):
            TableServers([address], channel=nobody, deadline_s=DEADLINE_S)
        asyncio.run(refused_writes(address, reader))
        plain = ChannelConfig()
        assert seen(address, plain).error is not None
        now = seen(address, reader)
        assert now.error is None
        assert now.samples['mfdist_refusals_total{reason="token"}'] == 1
        assert now.samples['mfdist_refusals_total{reason="right"}'] == 1
        request = urllib.request.Request(f"https://{said['metrics']}/metrics")
        request.add_header("Authorization", f"Bearer {(tls / 'reader.token').read_text('ascii').strip()}")
        context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        with urllib.request.urlopen(request, timeout=DEADLINE_S, context=context) as page:
            assert b"mfdist_checkpoint_age_seconds" in page.read()
    text = log.read_text("utf-8")
    assert not any(secret in text for secret in secrets)
    assert "PRIVATE KEY" not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line["message"] for line in lines if line["level"] == "info"] == ["serving", "draining", "stopped"]
    refusals = [line for line in lines if line["message"].startswith("refused")]
    assert [(line["reason"], line["client"]) for line in refusals] == [("token", None), ("right", "reader")]
    others = [line for line in text.splitlines() if not line.startswith("{")]
    assert all(re.search("Handshake failed", line) for line in others), others  # gRPC's, of the client without TLS
    assert len(others) >= 1


def test_reflection_needs_a_token_which_the_channel_of_the_page_sends(folder: Path) -> None:
    page = (ROOT / "docs" / "reference" / "protocol.md").read_text("utf-8")
    (channel,) = re.findall(r"^```text\n(trusted = .*?)^```$", page, re.DOTALL | re.MULTILINE)
    code = (
        "import sys, grpc\n"
        "from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase\n"
        f"address = sys.argv[1]\n{channel}\n"
        "if len(sys.argv) > 2:\n    channel = grpc.secure_channel(address, trusted)\n"
        "print(*ProtoReflectionDescriptorDatabase(channel).get_services())"
    )
    with running(folder, "", ["--tls", "tls"]) as (said, _):
        command = [sys.executable, "-I", "-c", code, said["address"]]
        known, nobody = (
            subprocess.run([*command, *more], cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S)
            for more in ((), ("without",))
        )
    assert "mfdist.table.v1.TableService" in known.stdout.split(), known.stderr
    assert nobody.returncode
    assert 'needs a token in the metadata, "authorization: Bearer TOKEN"; got none' in nobody.stderr


def test_the_token_for_training_is_enough_to_train_save_and_go_on(folder: Path) -> None:
    trust = ChannelConfig(ca=folder / "tls" / "ca.pem", token_file=folder / "tls" / "trainer.token")
    with running(folder, "", ["--tls", "tls", "--listen", "0.0.0.0:0"]) as (said, _):
        address = f"127.0.0.1:{said['address'].rpartition(':')[2]}"
        with TableServers([address], channel=trust, deadline_s=DEADLINE_S) as servers:
            table = RemoteTable(PLAN, servers, std=1.0, seed=7, fuse=OPTIMIZER)
            step(table, 1)
            servers.save(str(folder / "run"), 1)
            rows = table.rows()
        with TableServers([address], channel=trust, deadline_s=DEADLINE_S) as servers:  # as mfdist train --resume
            table = RemoteTable(PLAN, servers, std=1.0, seed=7, fuse=OPTIMIZER)
            step(table, 2)
            servers.load(str(folder / "run"))
            table.resume()
            assert torch.equal(table.rows(), rows)
            servers.drop("one")


async def refused_writes(address: str, channel: ChannelConfig) -> None:
    async with client_channel(address, channel) as connected:
        stub = TableServiceStub(connected)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Drop(pb.DropRequest(table="x"), timeout=DEADLINE_S)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_an_open_server_says_so(folder: Path) -> None:
    with running(folder, "", ["--insecure", "--listen", "0.0.0.0:0"]) as (said, log):
        address = f"127.0.0.1:{said['address'].rpartition(':')[2]}"
        assert seen(address, ChannelConfig()).error is None
        assert said["metrics"] is None
    warning = f"WARNING insecure: whoever reaches {said['address']} may read and change every row"
    assert warning in log.read_text("utf-8")

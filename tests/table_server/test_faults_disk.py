"""A server whose disk is full, whose log is damaged, or whose folder another one holds."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from mfdist.errors import CheckpointError, UnavailableError
from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.processes import ServerProcess, server
from tests.table_server.raw_client import RawClient, acknowledged

NUM_STEPS = 6


def pushed(process: ServerProcess, steps: range) -> RawClient:
    client = RawClient(process.address)
    client.create("a")
    client.join()
    for step in steps:
        acknowledged(client.push(client.message("a", step)))
    return client


def last_log(process: ServerProcess) -> Path:
    return max((process.data / "ledger").glob("*.db-wal"))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


def test_a_full_disk_is_told_and_once_there_is_room_all_goes_on(tmp_path: Path) -> None:
    with server(tmp_path / "full", file_bytes=1 << 20) as process, server(tmp_path / "roomy") as other:
        client = RawClient(process.address)
        client.create("a")
        client.join()
        step = 0
        with pytest.raises(grpc.RpcError) as raised:
            while step < 1000:
                acknowledged(client.push(client.message("a", step + 1)))
                step += 1
        assert step > 2
        assert raised.value.code() is grpc.StatusCode.DATA_LOSS
        assert "a push must be on disk before it is acknowledged" in raised.value.details()
        assert "make room" in raised.value.details()
        for _ in range(2):  # whoever asks again is told again, and rows that are not on disk are shown to nobody
            with pytest.raises(grpc.RpcError, match="make room"):
                acknowledged(client.push(client.message("a", step + 1)))
            with pytest.raises(grpc.RpcError, match="make room"):
                client.rows("a")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for again in range(step + 1, step + 4):
            acknowledged(client.push(client.message("a", again)))
        process.kill()
        process.start()
        recovered = RawClient(process.address)
        assert recovered.join()["a"] == step + 3
        assert np.array_equal(recovered.rows("a"), pushed(other, range(1, step + 4)).rows("a"))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_of_a_damaged_tail_the_rest_is_kept_and_the_client_learns_what_is_missing(tmp_path: Path, damage: str) -> None:
    with server(tmp_path / "a", log=tmp_path / "said") as process:
        client = pushed(process, range(1, NUM_STEPS + 1))
        rows = client.rows("a")
        log = last_log(process)
        process.kill()
        if damage == "cut":
            os.truncate(log, log.stat().st_size - 100)
        else:
            flip(log, log.stat().st_size - 100)
        process.start()
        again = RawClient(process.address)
        assert again.join()["a"] == NUM_STEPS - 1
        acknowledged(again.push(again.message("a", NUM_STEPS)))
        assert np.array_equal(again.rows("a"), rows)
    warnings = [line for line in (tmp_path / "said").read_text("utf-8").splitlines() if " WARNING " in line]
    assert len(warnings) == 1
    assert "dropped its last group of pushes, which was not whole" in warnings[0]


def test_a_log_damaged_before_its_tail_is_not_served(tmp_path: Path) -> None:
    with server(tmp_path / "a") as process:
        pushed(process, range(1, NUM_STEPS + 1))
        log = last_log(process)
        process.kill()
        whole = log.read_bytes()
        flip(log, len(whole) // 2)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"a server's log must be whole; .* is damaged: \d groups"):
                process.start()
        log.write_bytes(whole)
        process.start()
        assert RawClient(process.address).join()["a"] == NUM_STEPS


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with server(tmp_path / "a") as process:
        client = pushed(process, range(1, NUM_STEPS + 1))
        with pytest.raises(UnavailableError, match=f"is held by process {process.pid}; stop it, or give this one"):
            ServerProcess(tmp_path / "a").start()
        acknowledged(client.push(client.message("a", NUM_STEPS + 1)))
        process.kill()
        with server(tmp_path / "a") as heir:  # a dead one holds nothing
            assert RawClient(heir.address).join()["a"] == NUM_STEPS + 1


def test_one_that_is_stopped_comes_back_without_a_log(tmp_path: Path) -> None:
    with server(tmp_path / "a") as process:
        rows = pushed(process, range(1, NUM_STEPS + 1)).rows("a")
        process.stop()
        process.start()
        again = RawClient(process.address)
        assert again.join()["a"] == NUM_STEPS
        assert np.array_equal(again.rows("a"), rows)
        assert again.stub.Stats(pb.StatsRequest()).counters.get("replayed_pushes", 0) == 0


#: Fills a disk of its own before a server's first start and before a later one, and prints what they say.
_ON_A_FULL_DISK = """
import os, subprocess, sys
disk = sys.argv[1]

def serve():
    command = [sys.executable, "-m", "mfdist", "serve", "--data", f"{disk}/data"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline()
    if address:
        process.kill()
    print(address or process.stderr.read())
    process.wait()

def fill():
    try:
        with open(f"{disk}/fill", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass

fill()
serve()
os.unlink(f"{disk}/fill")
serve()
fill()
serve()
"""


def test_a_start_on_a_full_disk_says_that_it_is_full(tmp_path: Path) -> None:
    alone = ["unshare", "--map-root-user", "--user", "--mount"]
    mounted = [*alone, "sh", "-c", 'mount -t tmpfs -o size=40m none "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, to mount a small disk")
    done = subprocess.run(
        [*mounted, sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=110
    )
    first, address, later = (line for line in done.stdout.splitlines() if line)
    assert f"a server must be able to write its data; {tmp_path}/data: the disk is full, 0 bytes are free" in first
    assert address.strip().startswith("127.0.0.1:")
    assert "the disk is full, 0 bytes are free (disk I/O error); see that its disk works and has room" in later

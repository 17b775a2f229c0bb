"""The log of a process that is killed: what it acknowledged is there, whole, once and in order."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfdist.table_server.ledger import Ledger

DEADLINE_S = 60.0
NUM_CLIENTS = 4

# Each client has eight pushes in flight, as a server under load has; a line says what has been acknowledged.
APPEND = """
import os, random, sys, threading
from collections import deque
from pathlib import Path
from mfdist.table_server.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]), segment_bytes=1 << 20)

def payload(client, step):
    return random.Random(f"{client}/{step}").randbytes(random.Random(step).choice((10, 5000, 70_000)))

def append(client, step):
    waiting = deque()
    while True:
        whole = payload(client, step)
        waiting.append((step, ledger.append("a", step, client, [whole[:7], whole[7:]])))
        if len(waiting) == 8:
            done, future = waiting.popleft()
            future.result(60)
            os.write(1, b"%d %d\\n" % (client, done))
            if client == 0 and done % 50 == 0:
                ledger.put("dropped", str(done - 20).encode()).result(60)
                ledger.drop("a", done - 20)
        step += 1

threads = [threading.Thread(target=append, args=(client, int(step))) for client, step in enumerate(sys.argv[2:])]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_no_acknowledged_push_is_lost_and_none_is_there_in_part(tmp_path: Path, num_kills: int) -> None:
    draw, folder = random.Random(6), tmp_path / "ledger"
    acknowledged = dict.fromkeys(range(NUM_CLIENTS), 0)
    for _ in range(num_kills):
        begins = [str(step + 1) for step in acknowledged.values()]
        with (tmp_path / "acknowledged").open("w+b") as told:
            command = [sys.executable, "-c", APPEND, str(folder), *begins]
            process = subprocess.Popen(command, stdout=told, stderr=subprocess.PIPE)
            try:
                _wait_for_bytes(told.fileno(), process, draw.randrange(1, 4000))
                time.sleep(draw.random() * 0.02)
            finally:
                process.send_signal(signal.SIGKILL)
                _, errors = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == -signal.SIGKILL, errors.decode()
            told.seek(0)
            for line in told.read().decode().splitlines():
                client, step = map(int, line.split())
                acknowledged[client] = max(step, acknowledged[client])
        _check(folder, acknowledged)


def _wait_for_bytes(file: int, process: "subprocess.Popen[bytes]", num_bytes: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while os.fstat(file).st_size < num_bytes:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the process acknowledges nothing"
        time.sleep(0.002)


def _check(folder: Path, acknowledged: dict[int, int]) -> None:
    ledger = Ledger(folder)
    dropped = int(ledger.get("dropped") or 0)
    steps: dict[int, list[int]] = {client: [] for client in acknowledged}
    for push in ledger.pushes("a"):
        size = random.Random(push.step).choice((10, 5000, 70_000))
        assert push.payload == random.Random(f"{push.client}/{push.step}").randbytes(size)
        steps[push.client].append(push.step)
    ledger.close()
    for client, last in acknowledged.items():
        assert len(steps[client]) == len(set(steps[client])), "logged twice"
        assert steps[client] == sorted(steps[client])
        kept = [step for step in steps[client] if dropped < step <= last]
        assert kept == list(range(dropped + 1, last + 1)), f"client {client} lost what was acknowledged"

"""The log of a table server: order, repetitions, room, and what it does when the disk is full."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mfdist.errors import CheckpointError, ConfigError, UnavailableError
from mfdist.table_server.ledger import Ledger, LoggedPush
from tests.table_server.ledgers import DEADLINE_S, LARGE, SMALL, done, killed, reopened, steps_of


def test_pushes_come_back_in_their_order(ledger: Ledger) -> None:
    done(
        ledger.append("a", 2, 1, b"two"),
        ledger.append("b", 1, 0, b"other"),
        ledger.append("a", 1, 0, [b"o", b"", b"ne"]),
    )
    done(ledger.append("a", 3, 0, b""), ledger.append("a", 4, 0, []), ledger.append("a", 5, 0, bytes(9 << 20)))
    expected = [LoggedPush(2, 1, b"two"), LoggedPush(1, 0, b"one"), LoggedPush(3, 0, b""), LoggedPush(4, 0, b"")]
    for again in (ledger, None):
        again = again or reopened(ledger)
        *small, large = again.pushes("a")
        assert small == expected
        assert large == LoggedPush(5, 0, bytes(9 << 20))
        assert list(again.pushes("b")) == [LoggedPush(1, 0, b"other")]
        assert list(again.pushes("c")) == []
        assert again.tables() == ["a", "b"]
        assert again.notes == []
        again.close()


def test_a_push_that_is_there_is_not_logged_again(ledger: Ledger, tmp_path: Path) -> None:
    done(*(ledger.append("a", step, 0, b"first") for step in (1, 2, 2, 1, 4, 3, 4, 3, 5, 2)))
    again = reopened(ledger)
    done(*(again.append("a", step, 0, b"second") for step in (3, 5, 6)), again.append("a", 3, 1, b"of another"))
    assert [(push.step, push.client, push.payload) for push in again.pushes("a")] == [
        *((step, 0, b"first") for step in (1, 2, 4, 3, 5)),
        (6, 0, b"second"),
        (3, 1, b"of another"),
    ]
    again.close()


def test_records_are_a_map_in_order_with_pushes(ledger: Ledger, tmp_path: Path) -> None:
    done(ledger.put("shard/b", b"1"), ledger.put("shard/a", b"2"), ledger.put("epoch", b"1"), ledger.put("gone", b"x"))
    done(ledger.append("a", 1, 0, b"push"), ledger.put("epoch", b"2"), ledger.delete("gone"), ledger.delete("never"))
    for again in (Ledger(killed(ledger, tmp_path / "dead")), reopened(ledger)):
        assert again.items() == [("epoch", b"2"), ("shard/a", b"2"), ("shard/b", b"1")]
        assert again.items("shard/") == [("shard/a", b"2"), ("shard/b", b"1")]
        assert again.get("epoch") == b"2"
        assert again.get("gone") is None
        again.close()


def test_dropping_gives_room_back_and_keeps_records(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", segment_bytes=1 << 20)
    done(ledger.put("epoch", b"7"))
    for step in range(1, 41):
        done(ledger.append("a", step, 0, os.urandom(100_000)), ledger.append("b", step, 0, b"small"))
    assert len(list(ledger.folder.glob("*.db"))) >= 4
    before = ledger.num_bytes
    ledger.drop("a", 40)
    done(ledger.put("still", b"here"))
    assert ledger.num_bytes >= before  # b needs every file
    assert ledger.tables() == ["b"]
    ledger.drop("b", 20)
    done(ledger.put("still", b"there"))
    assert 0 < ledger.num_bytes < 0.75 * before
    assert [push.step for push in ledger.pushes("b")][-20:] == list(range(21, 41))
    ledger.drop("b")
    done(ledger.append("b", 41, 0, b"new"), ledger.put("last", b"one"))
    assert ledger.num_bytes < 1 << 20
    again = reopened(ledger)
    assert [push.step for push in again.pushes("b")] == [41]
    assert again.items() == [("epoch", b"7"), ("last", b"one"), ("still", b"there")]
    again.close()


def test_what_is_appended_behind_a_drop_stays(ledger: Ledger) -> None:
    for number in range(50):
        done(ledger.append("a", 1, 0, b"old"))
        ledger.drop("a")
        done(ledger.append("a", 1, 0, b"new %d" % number))
        assert list(ledger.pushes("a"))[-1] == LoggedPush(1, 0, b"new %d" % number)
        assert ledger.tables() == ["a"]
        ledger.drop("a")


def test_a_push_may_be_dropped_before_it_is_written_and_come_again(ledger: Ledger) -> None:
    for _ in range(50):
        first = ledger.append("a", 1, 0, b"push")
        ledger.drop("a")
        done(first, ledger.append("a", 1, 0, b"push"), ledger.append("a", 1, 0, b"push"))
        ledger.drop("a")
    done(ledger.append("a", 2, 0, b"push"))


def test_large_and_small_pushes_in_one_group_come_back(ledger: Ledger) -> None:
    payloads = [os.urandom(size) for size in (LARGE, 0, SMALL, 9 << 20, 1, LARGE)]
    parts = [[payload[:5], b"", payload[5:70_000], payload[70_000:]] for payload in payloads]
    done(*(ledger.append("a", step, 0, each) for step, each in enumerate(parts)))
    done(ledger.append("b", 1, 0, [b"x"] * 30_000))  # more parts than one call writes
    again = reopened(ledger)
    assert [push.payload for push in again.pushes("a")] == payloads
    assert [push.payload for push in again.pushes("b")] == [b"x" * 30_000]
    again.close()


@pytest.mark.parametrize("step", [-1, 1 << 62, (1 << 64) - 1])
def test_a_step_that_no_database_holds_is_refused(ledger: Ledger, step: int) -> None:
    with pytest.raises(ConfigError, match=f"a step must be in .* got {step} for table"):
        ledger.append("a", step, 0, b"push")
    done(ledger.append("a", 1, 0, b"push"))


def test_threads_share_groups(ledger: Ledger) -> None:
    def client(number: int) -> None:
        for step in range(1, 101):
            done(ledger.append("a", step, number, b"%d of %d" % (step, number)))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    pushes = list(ledger.pushes("a"))
    assert len(pushes) == 800
    for number in range(8):
        assert [push.step for push in pushes if push.client == number] == list(range(1, 101))
    assert ledger.waiting_bytes == 0


def test_a_log_has_one_user(ledger: Ledger) -> None:
    done(ledger.append("a", 1, 0, b"push"))
    with pytest.raises(UnavailableError, match="one process at a time may use a log; another one uses"):
        Ledger(ledger.folder)
    done(ledger.append("a", 2, 0, b"push"))


def test_a_closed_log_refuses(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    late = ledger.append("a", 1, 0, b"push")
    ledger.close()
    done(late)
    with pytest.raises(CheckpointError, match="a log must be open"):
        ledger.append("a", 2, 0, b"push")


# A full disk.


FULL = """
import os, resource, signal, sys, time
from pathlib import Path
from mfdist.errors import CheckpointError
from mfdist.table_server.ledger import Ledger

def limited(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

ledger, size = Ledger(Path(sys.argv[1])), int(sys.argv[3])
ledger.put("epoch", b"1").result(60)
ledger.append("a", 1, 0, bytes([1]) * size).result(60)
limited(1 << 20)
failed = []
for step in range(2, 200):
    try:
        ledger.append("a", step, 0, bytes([step]) * size).result(60)
        assert not failed, "what comes behind a failed push must not be acknowledged before it"
    except CheckpointError as error:
        assert "a push must be on disk before it is acknowledged" in str(error), error
        assert "make room" in str(error) and str(ledger.failure) == str(error)
        failed.append(step)
        if len(failed) == 4:
            break
assert failed == list(range(failed[0], failed[0] + 4)) and failed[0] > 2, failed
try:
    ledger.put("epoch", b"2").result(60)
    raise SystemExit("the disk is full")
except CheckpointError:
    assert ledger.get("epoch") == b"1"
assert ledger.waiting_bytes == size * len(failed) + 1
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "dropped":
    ledger.drop("a", failed[0] - 1)
    while ledger.failure is not None:
        time.sleep(0.01)
else:
    limited(resource.RLIM_INFINITY)
for step in failed if sys.argv[2] == "dropped" else reversed(range(1, step + 1)):
    ledger.append("a", step, 0, bytes([step]) * size).result(60)
assert ledger.failure is None and ledger.waiting_bytes == 0
assert ledger.get("epoch") == b"2"
limited(resource.RLIM_INFINITY)
ledger.append("a", 200, 0, bytes([200]) * size).result(60)  # behind all others
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("num_bytes", [SMALL, LARGE])
@pytest.mark.parametrize("end", ["killed", "room", "dropped"])
def test_a_full_disk_fails_pushes_until_there_is_room(tmp_path: Path, end: str, num_bytes: int) -> None:
    code = [sys.executable, "-c", FULL, str(tmp_path / "ledger"), end, str(num_bytes)]
    ran = subprocess.run(code, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == -9, ran.stderr
    steps, notes = steps_of(tmp_path / "ledger", num_bytes)
    assert (steps[0] == 1) == (end != "dropped")
    assert (steps[-1] == 200) == (end != "killed")
    if end != "killed":
        steps.pop()
    assert steps == list(range(steps[0], steps[-1] + 1))
    assert steps[-1] > 2
    assert end == "killed" or notes == []


@pytest.mark.parametrize(("num_bytes", "told"), [(SMALL, "database or disk is full"), (LARGE, "No space left")])
def test_a_disk_that_is_full_to_the_last_byte_can_be_emptied(tmp_path: Path, num_bytes: int, told: str) -> None:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs to mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        ledger, step = Ledger(tmp_path / "ledger"), 0
        with pytest.raises(CheckpointError, match=told):
            while step < 2000:
                done(ledger.append("a", step + 1, 0, os.urandom(num_bytes)))
                step += 1
        ledger.drop("a", step)
        until = time.monotonic() + DEADLINE_S
        while ledger.failure is not None:
            assert time.monotonic() < until
            time.sleep(0.01)
        done(ledger.append("a", step + 1, 0, b"tried again"), ledger.append("a", step + 2, 0, b"new"))
        ledger.close()
        again = Ledger(tmp_path / "ledger")
        assert [push.step for push in again.pushes("a")] == [step + 1, step + 2]
        again.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_log_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a server's log needs a folder; .*: File exists"):
        Ledger(tmp_path / "ledger")

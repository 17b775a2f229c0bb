"""The log of a table server whose files are damaged: what is dropped and told, and what is named."""

import os
from pathlib import Path

import pytest

from mfdist.errors import CheckpointError
from mfdist.table_server import ledger_segment
from mfdist.table_server.ledger import Ledger
from tests.table_server.ledgers import LARGE, SMALL, done, killed, steps_of

FRAME_BYTES = 24 + ledger_segment._PAGE_BYTES


def groups_of(ledger: Ledger, num_groups: int, num_bytes: int = SMALL) -> Path:
    """Append groups of one push each; return the write-ahead log, in which a small one takes six frames."""
    for step in range(1, num_groups + 1):
        done(ledger.append("a", step, 0, bytes([step]) * num_bytes))
    return max(ledger.folder.glob("*.db-wal"))


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("cut", [1, 4000, FRAME_BYTES, FRAME_BYTES + 12, 2 * FRAME_BYTES - 1])
def test_a_tail_cut_off_is_dropped_and_told(ledger: Ledger, tmp_path: Path, cut: int) -> None:
    name = groups_of(ledger, 5).name
    dead = killed(ledger, tmp_path / "dead")
    os.truncate(dead / name, (dead / name).stat().st_size - cut)
    steps, notes = steps_of(dead)
    assert steps == [1, 2, 3, 4]
    assert "dropped its last group of pushes, which was not whole; it followed group 4" in notes[0]
    ledger = Ledger(dead)
    done(ledger.append("a", 5, 0, bytes([5]) * SMALL), ledger.append("a", 6, 0, bytes([6]) * SMALL))
    ledger.close()
    assert steps_of(dead) == ([1, 2, 3, 4, 5, 6], [])


def test_damage_in_the_last_group_is_dropped_and_told(ledger: Ledger, tmp_path: Path) -> None:
    name = groups_of(ledger, 5).name
    dead = killed(ledger, tmp_path / "dead")
    flip(dead / name, (dead / name).stat().st_size - 1000)
    steps, (note,) = steps_of(dead)
    assert steps == [1, 2, 3, 4]
    assert "00000001.db: dropped its last group of pushes, which was not whole; it followed group 4" in note
    assert steps_of(dead) == ([1, 2, 3, 4], [])


@pytest.mark.parametrize("frame", [0, 1, 3, 5])
@pytest.mark.parametrize("at", [0, 9, 17, 24, 4000])
def test_damage_before_the_last_group_is_named(ledger: Ledger, tmp_path: Path, frame: int, at: int) -> None:
    name = groups_of(ledger, 5).name
    dead = killed(ledger, tmp_path / "dead")
    flip(dead / name, 32 + frame * FRAME_BYTES + at)
    with pytest.raises(CheckpointError, match=r"a server's log must be whole; .*00000001\.db is damaged: \d groups"):
        Ledger(dead)
    with pytest.raises(CheckpointError, match="is damaged"):  # and nothing was made of it
        Ledger(dead)


@pytest.mark.parametrize("at", [0, 10, 18, 28])
def test_a_damaged_header_is_named(ledger: Ledger, tmp_path: Path, at: int) -> None:
    name = groups_of(ledger, 3).name
    dead = killed(ledger, tmp_path / "dead")
    flip(dead / name, at)
    with pytest.raises(CheckpointError, match="is damaged: 3 groups of pushes behind group 0 cannot be read"):
        Ledger(dead)


@pytest.mark.parametrize(("num_bytes", "suffix"), [(SMALL, ".db"), (LARGE, ".db-large")])
def test_damage_in_a_closed_log_is_named(ledger: Ledger, num_bytes: int, suffix: str) -> None:
    groups_of(ledger, 5, num_bytes)
    ledger.close()
    (file,) = ledger.folder.glob(f"*{suffix}")
    size = file.stat().st_size
    flip(file, size - 1000)
    again = Ledger(ledger.folder)
    with pytest.raises(CheckpointError, match=r"is damaged: the push of client 0 for step \d of a fails its checksum"):
        list(again.pushes("a"))
    again.close()
    os.truncate(file, size - 3 * 4096)
    with pytest.raises(CheckpointError, match="is damaged"):
        list(Ledger(ledger.folder).pushes("a"))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_damaged_large_push_is_named(ledger: Ledger, tmp_path: Path, step: int) -> None:
    groups_of(ledger, 5, LARGE)
    dead = killed(ledger, tmp_path / "dead")
    flip(dead / "00000001.db-large", step * LARGE - 1)
    again = Ledger(dead)
    with pytest.raises(CheckpointError, match=f"is damaged: the push of client 0 for step {step} of a fails its check"):
        list(again.pushes("a"))
    again.close()


@pytest.mark.parametrize("rest", [0, 1, 4 * LARGE, 5 * LARGE - 1])
def test_large_pushes_cut_off_are_named(ledger: Ledger, tmp_path: Path, rest: int) -> None:
    groups_of(ledger, 5, LARGE)
    dead = killed(ledger, tmp_path / "dead")
    os.truncate(dead / "00000001.db-large", rest)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=f"is damaged: large pushes must be {5 * LARGE} bytes; there are {rest}"
        ):
            Ledger(dead)
    (dead / "00000001.db-large").unlink()
    with pytest.raises(CheckpointError, match="there are 0"):
        Ledger(dead)


def test_large_pushes_of_a_group_that_was_not_whole_are_dropped_with_it(ledger: Ledger, tmp_path: Path) -> None:
    name = groups_of(ledger, 5, LARGE).name
    dead = killed(ledger, tmp_path / "dead")
    os.truncate(dead / name, (dead / name).stat().st_size - 1)
    steps, notes = steps_of(dead, LARGE)
    assert steps == [1, 2, 3, 4]
    assert "dropped its last group of pushes, which was not whole; it followed group 4" in notes[0]
    again = Ledger(dead)
    done(*(again.append("a", step, 0, bytes([step]) * LARGE) for step in (4, 5, 6)))
    again.close()
    assert steps_of(dead, LARGE) == ([1, 2, 3, 4, 5, 6], [])


def test_a_file_whose_process_died_over_making_it_is_none(ledger: Ledger, tmp_path: Path) -> None:
    groups_of(ledger, 2)
    dead = killed(ledger, tmp_path / "dead")
    (dead / "00000002.db").touch()
    (dead / "00000003.db-wal").write_bytes(bytes(100))
    assert steps_of(dead) == ([1, 2], [])
    assert sorted(file.name for file in dead.glob("*.db")) == ["00000001.db"]

"""Logs that tests open again, as they are and as a killed process leaves them."""

import shutil
from concurrent.futures import Future
from pathlib import Path

from mfdist.table_server import ledger_segment
from mfdist.table_server.ledger import Ledger

DEADLINE_S = 60.0
SMALL, LARGE = 15_000, 25 * 4096  # in the database, and beside it
assert SMALL < ledger_segment._LARGE_BYTES < LARGE


def done(*futures: "Future[None]") -> None:
    for future in futures:
        future.result(DEADLINE_S)


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger(ledger.folder)


def killed(ledger: Ledger, target: Path) -> Path:
    """Return what a process that dies now leaves: its files, as they are."""
    return shutil.copytree(ledger.folder, target)


def steps_of(folder: Path, num_bytes: int = SMALL) -> tuple[list[int], list[str]]:
    ledger = Ledger(folder)
    try:
        pushes = list(ledger.pushes("a"))
        assert all(push.payload == bytes([push.step]) * num_bytes for push in pushes)
        return [push.step for push in pushes], ledger.notes
    finally:
        ledger.close()

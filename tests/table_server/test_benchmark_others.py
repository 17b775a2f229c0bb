"""Other programs are seen while something is measured; what the measurement starts itself is not one of them."""

import subprocess
import sys
import time

from mfdist.table_server import benchmark_others
from mfdist.table_server.benchmark_others import MANY_CORES, Others, said_of

WAIT_S = 60.0


def spinning(seconds: float) -> str:
    return f"import time\nwhile time.process_time() < {seconds}: pass"


def test_children_are_no_others_while_they_run_nor_when_they_have_ended() -> None:
    before = benchmark_others._own_s()
    child = subprocess.Popen([sys.executable, "-c", spinning(1.0)])
    until = time.monotonic() + WAIT_S
    while benchmark_others._own_s() < before + 0.4 and time.monotonic() < until:
        time.sleep(0.01)
    assert child.poll() is None
    assert child.wait(WAIT_S) == 0
    assert 0.9 < benchmark_others._own_s() - before < 3.0


def test_a_program_of_another_parent_is_seen() -> None:
    others, before, began_s = Others(), benchmark_others._own_s(), time.monotonic()
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {spinning(1.5)!r}])"
    subprocess.run([sys.executable, "-c", start], check=True, timeout=WAIT_S)  # its child is nobody's afterwards
    while (used_s := others.cores() * (time.monotonic() - began_s)) < 1.0 and time.monotonic() < began_s + WAIT_S:
        time.sleep(0.05)
    assert used_s >= 1.0
    assert benchmark_others._own_s() - before < 1.0


def test_few_cores_are_not_worth_a_word() -> None:
    assert said_of([]) == said_of([0.0, MANY_CORES / 2]) == ""
    assert "up to 0.9 of" in said_of([0.0, 0.9])

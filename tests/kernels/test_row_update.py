"""row_update against the float64 reference: on the CPU, in Triton's interpreter, and as torch operators."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("part", ["updates", "rounding", "bad_ids", "not_finite"])
def test_in_the_interpreter(part: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_row_update", part],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr

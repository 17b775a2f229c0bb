"""Writers killed with SIGKILL, at random times and before chosen calls, lose nothing that they had committed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mfdist


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_random", "num_chosen", "num_ranks"),
    [
        (11, 14, 1),
        (4, 5, 2),
        pytest.param(200, 200, 1, marks=pytest.mark.slow),
        pytest.param(200, 100, 3, marks=pytest.mark.slow),
    ],
    ids=["some", "some ranks", "many", "many ranks"],
)
def test_sigkill_loses_nothing_committed(tmp_path: Path, num_random: int, num_chosen: int, num_ranks: int) -> None:
    script = Path(__file__).with_name("crashes.py")
    root = str(Path(next(iter(mfdist.__path__))).parent)
    process = subprocess.run(
        [sys.executable, script, tmp_path / "checkpoints", str(num_random), str(num_chosen), str(num_ranks)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    outcome = json.loads(process.stdout)
    assert outcome["num_kills"] == num_random + num_chosen
    assert outcome["num_torn"] >= num_chosen // 2  # otherwise the kills missed what they are for
    assert outcome["latest"] > num_random // 2

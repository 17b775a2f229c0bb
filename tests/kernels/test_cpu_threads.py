"""Machine code on disk: kept between processes, and not gone on with once a part of it has changed."""

import os
import subprocess
import sys
from pathlib import Path

import mfdist.kernels.cpu_threads
from mfdist.kernels.cpu_threads import stamp_of

PART = """
from mfdist.kernels.cpu_threads import jit_part

@jit_part()
def part(x):
    return x + {number}
"""
KERNEL = """
import sys
from pathlib import Path

import mfdist.kernels.cpu_threads as threads

threads._stamp = lambda: threads.stamp_of(Path(__file__).parent)
from part import part

@threads.jit()
def kernel(x):
    return part(x)

if __name__ == "__main__":
    print(kernel(1), sum(kernel.stats.cache_hits.values()))
"""


def ran(folder: Path) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "kernel.py"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_kernel_is_compiled_again_once_a_part_in_another_file_changed(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL, "utf-8")
    (tmp_path / "part.py").write_text(PART.format(number=1), "utf-8")
    assert [ran(tmp_path) for _ in range(2)] == ["2 0", "2 1"]
    (tmp_path / "part.py").write_text(PART.format(number=40), "utf-8")
    assert [ran(tmp_path) for _ in range(2)] == ["41 0", "41 1"]


def test_the_stamp_is_of_all_kernels(tmp_path: Path) -> None:
    assert stamp_of(tmp_path) == (0, 0)
    assert mfdist.kernels.cpu_threads._stamp() == stamp_of(Path(mfdist.kernels.cpu_threads.__file__).parent)
    assert mfdist.kernels.cpu_threads._stamp()[1] > 100_000

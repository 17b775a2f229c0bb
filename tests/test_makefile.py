"""Setting up: the Makefile says what it lacks, and no machine without a GPU downloads a CUDA build of torch."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands in for pip: writes its arguments down, fails on those it is told to, and else leaves a torch's metadata.
PIP = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in {fails}) exit 1 ;; esac
mkdir -p "{info}"
printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 2.13.0+cpu\\n{requires}' >"{info}/METADATA"
"""


class Machine:
    """A bare environment, with or without a GPU, whose pip is the stand-in above."""

    def __init__(self, path: Path, *, has_gpu: bool = False, fails: str = "nothing", requires: str = "") -> None:
        self.out, self.log = path / "out.txt", path / "log.txt"
        self.python = path / "env" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path / "env"], check=True)
        site = next((path / "env" / "lib").glob("python3.*/site-packages"))
        self._bin = path / "bin"
        self._bin.mkdir()
        info = site / "torch-2.13.0+cpu.dist-info"
        pip = PIP.format(log=self.log, info=info, fails=fails, requires=requires)
        for name, text in {"pip": pip, "nvidia-smi": f"#!/bin/sh\nexit {int(not has_gpu)}\n"}.items():
            (self._bin / name).write_text(text)
            (self._bin / name).chmod(0o755)

    def set_up(self, **variables: str) -> list[str]:
        """Run the script and return what it asked of pip."""
        path = f"{self._bin}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PIP": "pip", "PIP_FLAGS": "", **variables}
        done = subprocess.run(
            ["sh", ".ci/torch.sh", self.python, self.out], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.log.read_text().splitlines() if self.log.exists() else []

    def constraints(self) -> set[str]:
        return set(self.out.read_text().splitlines())


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has builds with and without CUDA")


@linux_only
def test_without_a_gpu_a_local_wheel_is_enough(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.set_up() == ["install --no-index --no-deps torch==2.13.0"]
    assert {"torch==2.13.0", "triton==3.9.0"} <= machine.constraints()


@linux_only
def test_without_a_gpu_and_a_local_wheel_the_cpu_index_is_asked(tmp_path: Path) -> None:
    asked = Machine(tmp_path, fails="*--no-index*").set_up()
    assert asked[1:] == ["install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0"]


@linux_only
def test_with_a_gpu_torch_and_its_triton_are_pips_choice(tmp_path: Path) -> None:
    machine = Machine(tmp_path, has_gpu=True, requires="Requires-Dist: triton==3.7.1\\n")
    assert machine.set_up() == ["install torch==2.13.0"]
    assert not any(line.startswith("triton") for line in machine.constraints())


def test_another_version_can_be_asked_for(tmp_path: Path) -> None:
    assert Machine(tmp_path).set_up(TORCH="2.12.1")[0].endswith("torch==2.12.1")


def test_an_installed_torch_is_kept_and_stays(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.python = Path(sys.executable)
    assert machine.set_up(TORCH="2.11.0") == []
    assert f"torch=={metadata.version('torch').partition('+')[0]}" in machine.constraints()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user does, also when these tests were started by make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_an_old_or_missing_python_is_told(tmp_path: Path) -> None:
    done = make(f"VENV={tmp_path}/new", "PYTHON=false", "demo")
    assert done.returncode == 2
    assert 'Python 3.11 or later is needed; got "false"' in done.stdout


def test_a_python_without_pip_is_told(tmp_path: Path) -> None:
    bare = Machine(tmp_path).python
    done = make(f"VENV={tmp_path}/new", f"PYTHON={bare}", "test")
    assert done.returncode == 2
    assert "apt install python3-pip" in done.stdout
    assert not (tmp_path / "new").exists()


def test_in_the_activated_environment_the_python_that_made_it_installs(tmp_path: Path) -> None:
    venv = Machine(tmp_path).python.parents[1]
    (venv / "stamps").mkdir()
    done = make("-n", f"VENV={venv}", f"VIRTUAL_ENV={venv}", "add", "EXTRA=ray")
    installing = next(line for line in done.stdout.splitlines() if " install " in line)
    assert f"--python {venv}/bin/python" in installing
    assert not installing.strip().startswith(("python3 ", f"{venv}"))


def test_adding_nothing_is_told(tmp_path: Path) -> None:
    done = make(f"VENV={tmp_path}/new", "add")
    assert done.returncode == 2
    assert "make add EXTRA=ray" in done.stdout
    assert not (tmp_path / "new").exists()


def test_help_comes_first_and_lists_every_target() -> None:
    listed = {line.split()[1] for line in make().stdout.splitlines()}
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert listed == set(phony.split()[1:])

"""`mfdist launch --address` on clusters of several hosts, each a Ray node with an address of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from mfdist.launch.job import JobFiles
from tests.distributed.loopback_hosts import LoopbackHosts
from tests.distributed.ray_nodes import RayNodes
from tests.launch import jobs
from tests.test_packaging import build, laid_out

STEPS = 12


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package as an installed wheel has it, elsewhere than the code that the nodes find by themselves."""
    build(jobs.ROOT, tmp_path / "wheel", "--wheel")
    return laid_out(next((tmp_path / "wheel").glob("*.whl")), tmp_path / "site")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of hosts on which everything is installed but mfdist itself."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (folder / "bin").mkdir()
    script = folder / "bin" / "ray"
    script.write_text(f"#!{python}\nfrom ray.scripts.scripts import main\nmain()\n")
    script.chmod(0o755)
    # On PYTHONPATH a folder of packages is only that: what an editable install leaves there is not run.
    settings = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    without = subprocess.run(
        [python, "-c", "import torch, mfdist"], cwd=folder, env=settings, capture_output=True, text=True, timeout=120
    )
    assert "No module named 'mfdist'" in without.stderr
    return settings


def shown(nodes: RayNodes, code: Path) -> Mapping[str, str]:
    path = f"{code}:{nodes.environment['PYTHONPATH']}"
    return {**nodes.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("source", ["repository", pytest.param("wheel", marks=pytest.mark.slow)])
def test_code_travels_to_the_hosts(
    tmp_path: Path, source: str, bare: Mapping[str, str], request: pytest.FixtureRequest
) -> None:
    code = jobs.ROOT if source == "repository" else request.getfixturevalue("installed")
    path, run = jobs.config_file(tmp_path, steps=STEPS, every=5), tmp_path / "run"
    with LoopbackHosts(2) as hosts, RayNodes(hosts, cpus=1, environment=bare) as nodes:
        command = [sys.executable, "-m", "mfdist", "launch", path, "--out", run, "--address", nodes.address]
        command += ["--trainers", "2", "--servers", "2", "--quiet"]
        done = hosts[0].run(list(map(str, command)), env=shown(nodes, code), timeout_s=240)
        assert done.returncode == 0, done.stdout + done.stderr
    files = JobFiles(run)
    assert jobs.outcome(files)["reason"] == "finished"
    for actor in ("trainer-0", "trainer-1", "server-0", "server-1"):
        assert "/working_dir_files/" in files.log(actor).read_text().splitlines()[0]
    assert max(jobs.losses(run)) == STEPS

"""`mfdist launch --address` on clusters whose hosts do not go together: refused before training begins."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.loopback_hosts import LoopbackHosts
from tests.distributed.ray_nodes import RayNodes
from tests.launch import jobs

#: What makes one host unlike the other: run by Python itself when it starts there.
_UNLIKE = """
import importlib.metadata
import time

now, version = time.time, importlib.metadata.version


def other_version(name):
    if name == "tokenizers":
        raise importlib.metadata.PackageNotFoundError(name)
    return {"ray": "2.58.0", "torch": "2.12.1"}.get(name) or version(name)


time.time = lambda: now() + 3600
importlib.metadata.version = other_version
"""

#: A command of another Ray.
_OTHER_RAY = "import sys, ray; ray.__version__ = '2.58.0'; from mfdist.launch.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    unlike = tmp_path_factory.mktemp("unlike")
    (unlike / "sitecustomize.py").write_text(_UNLIKE)
    with LoopbackHosts(2) as hosts, RayNodes(hosts, of_host={1: {"PYTHONPATH": str(unlike)}}) as nodes:
        yield nodes


def refused(
    nodes: RayNodes, folder: Path, *arguments: str, code: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Launch a run that is to be refused."""
    python = [sys.executable, *(("-c", code) if code else ("-m", "mfdist"))]
    config = jobs.config_file(folder, steps=2, every=1)
    command = [*python, "launch", str(config), "--out", str(folder / "run"), "--address", nodes.address, *arguments]
    environment = {**nodes.environment, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=jobs.DEADLINE_S)
    assert not (folder / "run").exists()
    assert list(folder.glob(".mfdist*")) == []
    return done


def test_all_that_is_wrong_with_a_host_is_said_at_once(nodes: RayNodes, tmp_path: Path) -> None:
    done = refused(nodes, tmp_path, "--trainers", "2", "--servers", "1")
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mfdist: "))
    assert "must run Ray 2.60.0, as this one does; 127.0.0.3: 2.58.0; pip install" in line
    assert "127.0.0.3: without tokenizers;" in line
    assert "127.0.0.3: 2.12.1;" in line
    assert "to 5 minutes; 127.0.0.3: 60 minutes apart;" in line
    assert line.count("; also: ") == 3
    assert "127.0.0.2:" not in line


def test_another_ray_than_the_clusters_is_told(nodes: RayNodes, tmp_path: Path) -> None:
    done = refused(nodes, tmp_path, code=_OTHER_RAY)
    assert done.returncode == 1
    assert "the cluster has Ray 2.60.0 and Python 3." in done.stderr
    assert "this host Ray 2.58.0 and Python 3." in done.stderr
    assert "pip install 'ray==2.60.0' here" in done.stderr


@pytest.mark.slow  # Ray tries for 20 s
def test_a_wrong_token_is_told(nodes: RayNodes, tmp_path: Path) -> None:
    done = refused(nodes, tmp_path, RAY_AUTH_TOKEN="f" * 64)
    assert done.returncode == 1
    assert "the cluster answers but lets this host not in; RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr

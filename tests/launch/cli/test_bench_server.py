"""`mfdist bench server`: what it tells and writes, beside a real Ray actor; what it refuses."""

import json
import os
import subprocess
from importlib import metadata

import pytest

from tests.launch.cli.conftest import COMMAND, environment

DEADLINE_S = 300


@pytest.mark.slow
def test_a_server_is_measured_beside_a_ray_actor(tmp_path):
    pytest.importorskip("ray")
    ours = environment(tmp_path)
    del ours["OMP_NUM_THREADS"]  # so that Ray has its way
    command = [*COMMAND, "bench", "server", "--dir", tmp_path, "--seconds", "0.2", "--rounds", "1", "--ray", "2"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "found.json"], env=ours, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["decode", "tiny-train"]
    assert "requests/s" in lines[-5]
    cores = len(os.sched_getaffinity(0))
    names = ["table server", "Ray actor", f"Ray actor, num_cpus={cores}", "Ray actor, numpy"]
    assert [line[:24].strip() for line in lines[-4:]] == names
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    server, *actors = found["contest"]
    assert [one["contender"] for one in found["contest"]] == names
    assert [one["num_threads"] for one in found["contest"]] == [os.cpu_count(), 1, cores, 1]
    for one in actors:
        assert len(one["requests_per_s"]) == len(one["times_as_fast"]) == 2
        assert min(one["requests_per_s"]) > 0
        assert one["request_bytes"] > max(server["request_bytes"], 64 * 64 * 12)
        assert one["reply_bytes"] > 64 * 512 * 4
    assert found["memory"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_without_ray_it_says_what_to_install(mfdist, monkeypatch):
    version = metadata.version

    def without_ray(name):
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_ray)
    code, out, err = mfdist("bench", "server", "--ray", "1")
    assert (code, out) == (2, "")
    assert err.startswith("mfdist: mfdist bench server --ray needs Ray; pip install 'mfdist[ray]'")
    assert err.count("\n") == 1


def test_a_folder_that_is_not_there_is_refused(mfdist, tmp_path):
    code, _, err = mfdist("bench", "server", "--dir", tmp_path / "none")
    assert code == 2
    assert "--dir must be a folder that is there" in err

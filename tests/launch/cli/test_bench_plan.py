"""`mfdist bench plan` on real ranks: what it writes, and what it refuses."""

import json
import subprocess
import sys
import time

import pytest

from mfdist.sharding.topology import Topology


def test_figures_are_measured_and_every_kind_is_timed(mfdist, tmp_path):
    found, saved = tmp_path / "found.json", tmp_path / "machine.json"
    options = ("--world", "2", "--case", "tiny", "--turns", "2", "--shared")
    code, out, err = mfdist("bench", "plan", *options, "--json", found, "--save", saved)
    document = json.loads(found.read_text("utf-8"))
    (result,) = document["results"]
    assert (code == 0) == (result["loss"] <= 0.15), err
    assert set(result["measured_s"]) == set(result["predicted_s"])
    assert {"replicated", "column_wise", "row_wise"} <= set(result["measured_s"])
    assert result["chosen"] in result["measured_s"]
    assert all(seconds > 0 for seconds in result["measured_s"].values())
    assert out.splitlines()[1].startswith(f"  tiny: chose {result['chosen']}")
    topology = Topology.from_json(saved.read_text("utf-8"))
    assert (topology.name, topology.world_size, topology.num_hosts) == ("measured", 2, 1)
    code, out, _ = mfdist("plan", "demo", "--world", "2", "--topology", saved)
    assert code == 0


def test_figures_are_kept_where_what_follows_them_is_stopped(tmp_path):
    saved, errors = tmp_path / "machine.json", tmp_path / "errors"
    command = [sys.executable, "-m", "mfdist", "bench", "plan", "--world", "2", "--case", "tiny", "--turns", "1000000"]
    with errors.open("w") as err, subprocess.Popen([*command, "--shared", "--save", saved], stderr=err) as process:
        try:
            until = time.monotonic() + 120
            while not (saved.exists() and saved.read_text("utf-8").endswith("\n")):
                assert process.poll() is None and time.monotonic() < until, errors.read_text("utf-8")
                time.sleep(0.1)
            process.terminate()
            assert process.wait(60) != 0
        finally:
            process.kill()
    assert Topology.from_json(saved.read_text("utf-8")).name == "measured"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "1"], 'such as 2,4; got "1"'),
        (["--world", "2,x"], 'got "2,x"'),
        (["--case", "nothing"], "one of qkv, ffn2, n-grams, tiny; got nothing"),
        (["--device", "tpu"], 'auto, cpu or cuda; got "tpu"'),
        (["--device", "cuda", "--shared"], "leave one out"),
        (["--device", "cuda", "--world", "999"], "each rank needs a GPU of its own; got --world 999"),
        (["--save", "nowhere/machine.json"], "--save must name a file"),
    ],
)
def test_misuse_is_one_line(mfdist, arguments, message):
    code, out, err = mfdist("bench", "plan", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err

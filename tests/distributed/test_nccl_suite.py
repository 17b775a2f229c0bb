"""The suite for several GPUs, on CPUs: what it runs, what it writes, and that a failure is one."""

import json
import subprocess
import sys

import pytest

from tests.distributed import suite_ranks

#: The suite where nothing finds Ray.
_WITHOUT_RAY = """
import sys
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *more: None if name == "ray" else find(name, *more)
from tests.distributed.nccl_suite import main
sys.exit(main())
"""


def suite(tmp_path, *arguments, timeout_s=280):
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.distributed.nccl_suite", "--device", "cpu", "--json", str(found)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout_s)
    return done.returncode, done.stdout, json.loads(found.read_text("utf-8")) if found.exists() else None


def test_kinds_equal_one_table(tmp_path):
    asked = ("row_wise", "pooled_rows", "column_wise", "table_wise", "grid")
    options = [option for kind in asked for option in ("--kind", kind)]
    code, out, document = suite(tmp_path, "--world", "2", "--only", "equality", *options)
    assert code == 0, out
    assert out.endswith("all passed; not begun for want of time: nothing\n")
    found = {each["kind"]: each for each in document["found"]["equality"]}
    assert set(found) == set(asked)
    for kind, each in found.items():
        assert each["distance"] <= 2e-6
        assert each["same_bits"] or kind not in suite_ranks.EXACT


@pytest.mark.parametrize("options", [(), ("--collectives",)])
def test_messages_of_all_sizes_arrive(tmp_path, options):
    code, out, document = suite(tmp_path, "--world", "3", "--only", "exchange", *options)
    assert code == 0, out
    assert document["found"]["exchange"] == [{"wrong": 0, "by_peers": not options, "world_size": 3}]


def test_the_benchmark_is_part_of_it(tmp_path):
    options = ("--only", "bench", "--case", "ids", "--contender", "row_wise-pooled", "--seconds", "0")
    code, out, document = suite(tmp_path, "--world", "2", *options)
    assert code == 0, out
    (found,) = document["found"]["bench"]
    assert found["world_size"] == 2 and found["tokens_per_s"] > 0 and found["share_of_plain"] > 0
    assert found["share_if_idle"] > 0
    assert "of a plain all-to-all" in out


def test_the_same_training_twice_gives_the_same_bytes(tmp_path):
    code, out, document = suite(tmp_path, "--world", "2", "--only", "repeat")
    assert code == 0, out
    (found,) = document["found"]["repeat"]
    assert found["num_files"] > 100 and found["differing"] == []
    assert f"0 of {found['num_files']} files of the last checkpoint differ" in out


@pytest.mark.slow
def test_a_run_saved_on_two_ranks_goes_on_on_one(tmp_path):
    code, out, document = suite(tmp_path, "--world", "2", "--only", "links", "--only", "train")
    assert code == 0, out
    assert [each["many"]["step"] for each in document["found"]["train"]] == list(range(7, 13))
    assert all(each["distance"] <= 1e-3 for each in document["found"]["train"])
    assert all(each["seconds"] > 0 for each in document["found"]["links"])


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_all_parts_run_on_two_ranks(tmp_path):
    options = ("--world", "2", "--kind", "column_wise", "--case", "tiny-qkv", "--contender", "column_wise")
    code, out, document = suite(tmp_path, *options, "--seconds", "0", timeout_s=1200)
    assert code == 0, out
    assert [each["kind"] for each in document["found"]["conformance"]] == ["column_wise"]
    assert document["found"]["bench"][0]["share_of_plain"] > 0
    plans = document["found"]["plan"]
    assert [each["case"] for each in plans] == ["qkv", "ffn2", "n-grams", "tiny"]
    assert all(each["topology"]["world_size"] == each["world_size"] == 2 for each in plans)


def test_what_is_not_begun_is_told(tmp_path):
    code, out, document = suite(
        tmp_path, "--world", "1", "--only", "conformance", "--kind", "row_wise", "--minutes", "0"
    )
    assert code == 0
    assert document["not_begun"] == ["conformance 1 row_wise"] and document["found"]["conformance"] == []
    assert "not begun for want of time: conformance 1 row_wise" in out


def test_a_stage_that_hangs_is_ended_and_the_next_ones_run(tmp_path):
    options = ("--only", "conformance", "--kind", "column_wise", "--kind", "row_wise", "--stage-seconds", "0.01")
    code, out, document = suite(tmp_path, "--world", "1", *options)
    assert code == 1
    assert document["failed"] == ["conformance 1 column_wise", "conformance 1 row_wise"]
    assert out.count("all ranks must be done within 0.01 s; late: [0]") == 2


@pytest.mark.slow
def test_a_launched_training_has_the_losses_of_one_under_torchrun(tmp_path):
    pytest.importorskip("ray")
    code, out, document = suite(tmp_path, "--world", "2", "--only", "launch")
    assert code == 0, out
    assert [each["launched"]["step"] for each in document["found"]["launch"]] == list(range(1, 13))


@pytest.mark.slow
def test_a_training_over_two_hosts_has_the_losses_of_one(tmp_path, namespaces):
    pytest.importorskip("ray")
    code, out, document = suite(tmp_path, "--world", "2", "--only", "hosts")
    assert code == 0, out
    found = document["found"]["hosts"]
    assert ["apart" in each for each in found] == [True] * 12 + [False] * 12  # the others were launched
    assert all(each["distance"] == 0 for each in found)


def test_without_ray_launching_is_skipped_and_said_to_be(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "-c", _WITHOUT_RAY, "--device", "cpu", "--world", "1", "--only", "launch"]
    done = subprocess.run([*command, "--json", str(found)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == "skipped launch 1: Ray is not installed here; pip install 'mfdist[ray]'"
    assert last == "all passed; skipped: launch 1; not begun for want of time: nothing"
    assert json.loads(found.read_text("utf-8"))["skipped"] == ["launch 1"]

"""`mfdist bench checkpoint`: every contender measured, loads compared, nothing left behind."""

import json

import torch


def test_a_small_run_measures_all_and_leaves_nothing(mfdist, tmp_path):
    (tmp_path / "disk").mkdir()
    found = tmp_path / "found.json"
    code, out, err = mfdist(
        *("bench", "checkpoint", "--dir", tmp_path / "disk"),
        *("--megabytes", "1", "--ranks", "2", "--rounds", "1", "--json", found),
    )
    assert code == 0, err
    document = json.loads(found.read_text("utf-8"))
    assert {(result["contender"], result["act"], result["num_ranks"]) for result in document["results"]} == {
        (contender, act, 2) for contender in ("mfdist", "torch", "file") for act in ("save", "load")
    }
    for result in document["results"]:
        assert result["bytes_per_s"] > 0
        assert len(result["seconds"]) == 1
        assert (result["share_of_file"] == 1) >= (result["contender"] == "file")
    stalls = document["background"]
    assert [stall["num_threads"] for stall in stalls] == sorted({1, torch.get_num_threads()})
    assert all(stall["stall_s"] <= stall["save_s"] for stall in stalls)
    assert list((tmp_path / "disk").iterdir()) == []
    assert len(out.splitlines()) == 1 + 6 + len(stalls)


def test_what_cannot_be_measured_is_misuse(mfdist, tmp_path):
    for wrong in (("--dir", tmp_path / "none"), ("--ranks", "two"), ("--ranks", "0"), ("--json", tmp_path / "a/b")):
        code, out, err = mfdist("bench", "checkpoint", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)

"""`mfdist evaluate` on a real run."""

import json

import pytest


def test_json_repeats_the_final_validation_of_training(mfdist, finished):
    run_dir, summary, _ = finished
    done = mfdist("evaluate", run_dir, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["step"] == 12
    assert report["num_tokens"] == summary["validation"]["num_tokens"]
    assert report["bits_per_byte"] == pytest.approx(summary["validation"]["bits_per_byte"], rel=1e-6)
    assert report["baselines_bits_per_byte"] == summary["baselines_bits_per_byte"]


def test_people_get_a_line_for_each_model(mfdist, finished):
    done = mfdist("evaluate", finished[0], "--step", 10)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert "validation tokens" in rows[0]
    assert [row[:14].strip() for row in rows[1:]] == ["step 10", "byte unigram", "order-2 n-gram"]

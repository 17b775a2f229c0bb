"""`mfdist evaluate` on a real run."""

import json

import pytest


def test_json_repeats_the_final_validation_of_training(mfdist, finished):
    run_dir, summary, _ = finished
    code, out, err = mfdist("evaluate", run_dir, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["step"] == 12
    assert report["num_tokens"] == summary["validation"]["num_tokens"]
    assert report["bits_per_byte"] == pytest.approx(summary["validation"]["bits_per_byte"], rel=1e-6)
    assert report["baselines_bits_per_byte"] == summary["baselines_bits_per_byte"]


def test_people_get_a_line_for_each_model(mfdist, finished):
    code, out, err = mfdist("evaluate", finished[0], "--step", 10)
    assert code == 0, err
    rows = out.splitlines()
    assert "validation tokens" in rows[0]
    assert [row[:14].strip() for row in rows[1:]] == ["step 10", "byte unigram", "order-2 n-gram"]

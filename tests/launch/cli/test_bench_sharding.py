"""`mfdist bench sharding` on real ranks: every kind is right and timed; what is refused."""

import json

import pytest


def test_every_kind_is_compared_and_timed(mfdist, tmp_path):
    found = tmp_path / "found.json"
    options = ("--world", "2", "--case", "tiny-qkv", "--device", "cpu", "--seconds", "0")
    code, out, err = mfdist("bench", "sharding", *options, "--json", found)
    assert code == 0, err
    results = {result["contender"]: result for result in json.loads(found.read_text("utf-8"))["results"]}
    for kind in ("column_wise", "table_wise", "row_wise", "row_wise-each-time", "row_wise-pooled", "replicated"):
        result = results[kind]
        assert 0 <= result["error"] <= 2e-6 and not result["is_wrong"]
        assert 0 < result["forward_s"] < result["step_s"] and result["num_turns"] >= 3
        assert result["sent_bytes"] > 0 and result["exchange_s"] > 0 and result["plain_s"] > 0
        assert any(line.split()[1:3] == ["tiny-qkv", kind] for line in out.splitlines())
    assert results["row_wise"]["sent_bytes"] < results["row_wise-each-time"]["sent_bytes"]
    assert "even number of ranks" in results["grid"]["note"] and results["grid"]["step_s"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "0"], 'such as 2,4; got "0"'),
        (["--device", "tpu"], 'must be auto, cpu or cuda; got "tpu"'),
        (["--device", "cpu", "--case", "nothing"], "one of tiny-qkv, base-ffn2, ids, ids-zipf; got nothing"),
        (["--device", "cpu", "--contender", "nobody"], "row_wise-each-time, row_wise-pooled, grid, replicated"),
        (["--json", "nowhere/found.json"], "--json must name a file"),
    ],
)
def test_misuse_is_one_line(mfdist, arguments, message):
    code, out, err = mfdist("bench", "sharding", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err

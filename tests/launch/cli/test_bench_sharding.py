"""`mfdist bench sharding` on real ranks: every kind is right and timed; what is refused."""

import json

import pytest

#: Where columns stand in a line of the table.
COLUMNS = {"in a row": slice(65, 76), "if idle": slice(106, 114)}


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
        # A processor queues nothing behind other work.
        assert (result["started_s"], result["plain_started_s"]) == (result["exchange_s"], result["plain_s"])
        assert result["share_if_idle"] == result["share_of_plain"] == result["plain_s"] / result["exchange_s"]
        assert result["tokens_per_s"] == result["tokens_a_rank"] * 2 / result["in_a_row_s"]
        (line,) = (line for line in out.splitlines() if line.split()[1:3] == ["tiny-qkv", kind])
        assert line[COLUMNS["in a row"]].split() == [f"{result['in_a_row_s'] * 1e3:.2f}", "ms"]
        assert float(line[COLUMNS["if idle"]]) == pytest.approx(result["share_if_idle"], abs=0.0051)
    header = next(line for line in out.splitlines() if line.startswith("ranks"))
    assert all(header[place].strip() == name for name, place in COLUMNS.items())
    assert results["row_wise"]["sent_bytes"] < results["row_wise-each-time"]["sent_bytes"]
    assert "even number of ranks" in results["grid"]["note"] and results["grid"]["step_s"] is None
    assert results["grid"]["in_a_row_s"] is results["grid"]["tokens_per_s"] is results["grid"]["share_if_idle"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "0"], 'such as 2,4; got "0"'),
        (["--device", "tpu"], 'must be auto, cpu or cuda; got "tpu"'),
        (["--device", "cpu", "--case", "nothing"], "one of tiny-qkv, base-ffn2, ids, ids-zipf; got nothing"),
        (["--device", "cpu", "--contender", "nobody"], "row_wise-each-time, row_wise-pooled, grid, replicated"),
        (["--device", "cpu", "--contender", "*-nccl"], "got *-nccl"),
        (["--json", "nowhere/found.json"], "--json must name a file"),
    ],
)
def test_misuse_is_one_line(mfdist, arguments, message):
    code, out, err = mfdist("bench", "sharding", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err

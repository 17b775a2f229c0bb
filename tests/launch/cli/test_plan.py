"""`mfdist plan`: what fits and why, as text and as JSON; growth; plans by hand."""

import json

import pytest

from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.topology import cpu


@pytest.fixture
def plan(mfdist):
    """Runs the verb on the smallest preset; returns (exit code, stdout, stderr)."""
    return lambda *arguments: mfdist("plan", "demo", *arguments)


def test_people_read_what_fits_and_why(plan):
    code, out, err = plan("--world", "8", "--hbm", "1GB")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "demo: 12 tables on 8 ranks, 1 host, 4,096 tokens a step"
    assert lines[1].startswith("fits: █")
    assert "usable on the fullest rank" in lines[1]
    assert any(line.startswith("predicted step: ") for line in lines)
    assert any(line.startswith("blocks.*.qkv ×4 ") and "next best is" in line for line in lines)
    assert lines[-1].split()[1] in ("column_wise", "replicated", "table_wise", "row_wise")
    assert "\x1b" not in out


def test_programs_read_everything(plan):
    code, out, _ = plan("--world", "4", "--hbm", "1GB", "--batch-tokens", "8192", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["fits"], document["world_size"], document["batch_tokens"]) == (True, 4, 8192)
    assert len(document["rank_bytes"]) == 4
    assert len(document["tables"]) == 12
    held = {"weight_bytes": 0, "saved_bytes": 0}
    for table in document["tables"]:
        assert sum(ranks["num_ranks"] for ranks in table["ranks"]) == 4
        assert table["options"] == sorted(table["options"], key=lambda option: option["step_s"])
        assert table["reason"]
        for key in held:
            held[key] += sum(ranks["num_ranks"] * ranks[key] for ranks in table["ranks"])
    assert held["weight_bytes"] >= sum(
        table["ranks"][0]["rows"] * table["ranks"][0]["columns"] for table in document["tables"]
    )
    assert document["advice"] is None
    total = sum(table[key] for table in document["tables"] for key in ("lookup_s", "exchange_s", "update_s", "host_s"))
    assert document["step_s"] == pytest.approx(total + document["dense_s"])


def test_what_does_not_fit_is_told_with_what_would(plan):
    code, out, _ = plan("--world", "2", "--hbm", "60MB", "--host-memory", "1TB")
    assert code == 1
    assert "DOES NOT FIT" in out
    assert "without room are" in out
    assert "fits        table servers in host memory" in out
    code, out, _ = plan("--world", "2", "--hbm", "60MB", "--json")
    advice = json.loads(out)["advice"]
    assert code == 1
    assert advice["missing_bytes"] > 0
    assert advice["unplaced"]
    assert any(change["fits"] for change in advice["changes"])


def test_growth_is_a_line_for_each_world(plan):
    code, out, _ = plan("--simulate", "64,8,1", "--batch-tokens", "65536")
    assert code == 0
    assert out.startswith("strong scaling: 65,536 tokens a step at every size\n")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["1", "8", "64"]
    assert "100 %" in out.splitlines()[2]
    _, out, _ = plan("--simulate", "8,64", "--json")
    worlds = json.loads(out)["worlds"]
    assert [(world["world_size"], world["num_hosts"]) for world in worlds] == [(8, 1), (64, 8)]
    assert worlds[0]["batch_tokens"] == worlds[1]["batch_tokens"]


def test_growth_is_over_hosts_as_full_as_the_one_given(plan):
    _, out, _ = plan("--world", "8", "--hosts", "2", "--hbm", "80GB", "--simulate", "8,64", "--json")
    assert [(world["world_size"], world["num_hosts"]) for world in json.loads(out)["worlds"]] == [(8, 2), (64, 16)]


def test_weak_growth_keeps_the_tokens_of_a_rank(plan):
    code, out, _ = plan("--simulate", "8,64", "--weak", "--batch-tokens", "65536")
    assert code == 0
    assert out.startswith("weak scaling: 8,192 tokens a rank at every size\n")
    _, out, _ = plan("--simulate", "8,64", "--weak", "--batch-tokens", "65536", "--json")
    document = json.loads(out)
    assert document["scaling"] == "weak"
    assert [world["batch_tokens"] for world in document["worlds"]] == [65536, 8 * 65536]


def test_a_plan_whose_rows_are_pooled_is_told_and_drawn(plan, tmp_path):
    file = tmp_path / "plan.json"
    assert plan("--world", "8", "--out", file)[0] == 0
    document = json.loads(file.read_text("utf-8"))
    for table in document["tables"]:
        table["kind"], table["pooled"] = "row_wise", True
        table.pop("columns", None)
    file.write_text(json.dumps(document), "utf-8")
    code, out, err = plan("--world", "8", "--plan", file)
    assert code == 0, err
    assert "row_wise, pooled" in out and "▨▨▨▨▨▨▨▨" in out


def test_a_plan_is_written_and_priced_again(plan, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = plan("--world", "4", "--out", file, "--json")
    assert code == 0
    chosen = json.loads(out)
    written = ShardingPlan.from_json(file.read_text("utf-8"))
    assert [table.kind for table in written.tables] == [table["kind"] for table in chosen["tables"]]
    code, out, _ = plan("--world", "4", "--plan", file, "--json")
    assert (code, json.loads(out)) == (0, chosen)


def test_a_plan_by_hand_for_something_else_is_refused(plan, tmp_path):
    file = tmp_path / "plan.json"
    plan("--world", "4", "--out", file)
    code, out, err = plan("--world", "8", "--plan", file)
    assert (code, out) == (2, "")
    assert "it is for 4 ranks, the mesh has 8" in err
    code, _, err = plan("--world", "4", "--plan", file, "--set", "model.extra_bits=1")
    assert code == 2
    assert "in the plan" in err
    assert "in the model" in err


def test_measured_figures_come_from_a_file(plan, tmp_path):
    file = tmp_path / "machine.json"
    file.write_text(cpu(2, memory_bytes=1 << 30).to_json(), "utf-8")
    code, out, _ = plan("--world", "4", "--topology", file, "--json")
    slow = json.loads(out)["step_s"]
    assert code == 0
    _, out, _ = plan("--world", "4", "--json")
    assert json.loads(out)["step_s"] < slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mfdist plan demo --world 8"),
        (["--world", "8", "--hosts", "3"], "got 8 ranks on 3 hosts"),
        (["--world", "8", "--hbm", "80XB"], 'such as 80GB or 64GiB; got "80XB"'),
        (["--world", "8", "--topology", "b200"], "must be h100, cpu or a JSON file"),
        (["--simulate", "8,x"], 'got "8,x"'),
        (["--simulate", "8", "--out", "plan.json"], "leave out --plan and --out"),
        (["--simulate", "8", "--hosts", "2"], "give --world"),
        (["--simulate", "8", "--world", "8", "--hosts", "3"], "got 8 ranks on 3 hosts"),
        (["--world", "8", "--weak"], "--simulate 8,64,512 --weak"),
        (["--world", "8", "--plan", "nowhere.json"], "nowhere.json: No such file"),
        (["--world", "8", "--set", "model.kind=dense"], 'got model.kind="dense"'),
        (["--world", "0"], "'--world'"),
    ],
)
def test_misuse_is_one_line(plan, arguments, message):
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err

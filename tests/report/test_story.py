"""Stories of runs in every state, and what is said of them."""

import json
from dataclasses import replace

import pytest

from mfdist.errors import ConfigError
from mfdist.report.document import Report
from mfdist.report.story import Run
from mfdist.sharding import kinds
from mfdist.sharding.plan import ShardingPlan
from tests.report import recorded as r
from tests.report.recorded import recorded


def document(run, *others):
    found = Report(run.path, [other.path for other in others]).document()
    json.dumps(found, allow_nan=False)  # strict JSON, whatever happened
    return found


def texts(found):
    return [(finding["level"], finding["text"]) for finding in found["findings"]]


def test_a_finished_run_says_what_it_learnt_how_fast_and_how_its_tables_are_used(tmp_path):
    found = document(recorded(tmp_path / "run", r.whole_run()))
    story = found["runs"][0]
    assert story["state"] == {"kind": "finished", "text": "finished", "detail": ""}
    assert found["summary"][:2] == [
        "A MemoryFormer with 100k parameters in tables learnt from 5.1k tokens in 40 steps.",
        "It compresses the whole validation text to 2.000 bits per byte, 26% less than order-2 n-gram needs (2.700).",
    ]
    assert "0.52 times as fast as its dense twin; 40% of a step goes to lookups" in found["summary"][2]
    assert found["summary"][3].startswith("Its codes carry ") and "evenly over its layers" in found["summary"][3]
    assert texts(found) == [("note", "notes.txt is not text; skipped")]
    labels = [figure["label"] for figure in found["figures"]]
    assert labels == [
        "validation",
        "training loss",
        "speed",
        "steps",
        "time",
        "peak memory",
        "in tables",
        "codes carry",
    ]
    assert story["steps"]["places"]["tokens"][-1] == 40 * 128 and len(story["steps"]["curves"]["loss"]["mean"]) == 40
    assert [row["step"] for row in story["evaluations"]] == [10, 20, 30, 40]
    assert story["flops_per_token"] > 0
    flops = [row["tokens"] * story["flops_per_token"] for row in story["evaluations"]]
    assert [row["flops"] for row in story["evaluations"]] == pytest.approx(flops)
    assert story["steps"]["places"]["flops"][-1] == pytest.approx(40 * 128 * story["flops_per_token"], rel=1e-5)
    assert [layer["name"] for layer in story["tables"]["detail"]["layers"]][:2] == ["blocks.0.qkv", "blocks.0.ffn1"]
    assert story["plan"]["num_holders"] == 1 and len(story["plan"]["tables"]) == 6
    assert [save["is_there"] for save in story["checkpoints"]] == [False, False]  # pruned, or moved elsewhere


ENDINGS = [
    ([], "new", "The run has not made a step yet.", None),
    ([r.started()], "running", "The run has not made a step yet.", None),
    ([r.started(), r.stepped(1)], "running", "is learning from 128 tokens in 1 of 40 steps", None),
    (
        [r.started(), r.stepped(1), r.stopped(1, "SIGTERM")],
        "stopped",
        "learnt from 128 tokens",
        ("note", "Stopped by SIGTERM"),
    ),
    (
        [r.started(), r.stepped(1), r.stepped(2), r.failed("the loss must stay finite; got nan at step 3")],
        "failed",
        "in 2 of 40 steps",
        ("bad", "Training failed: the loss must stay finite"),
    ),
]


@pytest.mark.parametrize(("events", "kind", "words", "finding"), ENDINGS)
def test_a_run_that_is_not_whole_has_a_story_too(tmp_path, events, kind, words, finding):
    found = document(recorded(tmp_path / "run", events))
    assert found["runs"][0]["state"]["kind"] == kind
    assert words in found["summary"][0]
    assert bool(finding) == bool(texts(found))
    if finding:
        level, text = texts(found)[0]
        assert (level, text[: len(finding[1])]) == finding


def test_the_command_that_goes_on_with_a_run_can_be_pasted(tmp_path):
    found = texts(document(recorded(tmp_path / "my run", [r.started(), r.stepped(1), r.stopped(1, "SIGTERM")])))
    assert found[0][1].endswith(f"Go on with it by: mfdist train --resume '{tmp_path / 'my run'}'")


def test_two_runs_are_compared_after_equal_tokens(tmp_path):
    ours = recorded(tmp_path / "tables", r.whole_run())
    theirs = recorded(tmp_path / "dense", [*r.whole_run(kind="dense")[:25], r.evaluated(20, 2.75)], kind="dense")
    found = document(ours, theirs)
    assert [story["label"] for story in found["runs"]] == ["tables", "dense"]
    assert "After 2.6k tokens it does 9.1% better than dense (2.500 against 2.750 bits per byte)." in found["summary"]
    fresh = recorded(tmp_path / "fresh", [])
    assert any("cannot be compared with fresh" in sentence for sentence in document(ours, fresh)["summary"])
    (tmp_path / "elsewhere").mkdir()
    same = recorded(tmp_path / "elsewhere" / "tables", r.whole_run())
    assert [story["label"] for story in document(ours, same)["runs"]] == ["tables (1)", "tables (2)"]


def test_what_is_wrong_is_said(tmp_path):
    events = [r.started(), *(r.stepped(step) for step in range(1, 41))]
    events += [r.evaluated(10, 3.0), r.evaluated(20, 2.9), r.evaluated(30, 3.2), r.evaluated(40, 3.1, is_final=True)]
    found = texts(document(recorded(tmp_path / "run", [*events, r.stopped(40)])))
    assert found[0][0] == "note" and "best at step 20 (2.900 bits per byte) and 10.3% worse at step 30" in found[0][1]
    assert found[1] == ("bad", "The model does no better than order-2 n-gram: it has learnt next to nothing.")


def test_a_collapse_is_bad_until_it_is_over(tmp_path):
    warning = r.Warned(message="a memory layer must hash tokens apart; after step 10 blocks.0.qkv does not")
    over = document(recorded(tmp_path / "over", [*r.whole_run()[:-1], warning, r.stopped(40)]))
    assert texts(over)[-1] == ("note", f"{warning.message}. By the last validation it had recovered.")
    hits = r.counts()[0].hits * 0
    hits[:, 3] = 512
    counted = [replace(r.counts()[0], hits=hits)]
    last = r.Diagnosed(step=40, num_tokens=512, layers=tuple(map(r.use_of, counted)), elapsed_s=0.0)
    still = document(recorded(tmp_path / "still", [r.started(), r.stepped(40), r.evaluated(40), last, warning]))
    assert ("bad", warning.message) in texts(still)
    assert "Its codes carry 0% of the bits that even codes would; least in blocks.0.qkv (0%, 94%" in still["summary"][3]


def test_details_of_another_version_or_damaged_are_left_out(tmp_path):
    run = recorded(tmp_path / "run", r.whole_run())
    for text in ('{"version": 2}', "{", "[]"):
        run.table_use_path.write_text(text)
        tables = document(run)["runs"][0]["tables"]
        assert tables["detail"] is None and len(tables["history"]) == 4


def test_the_plan_is_what_the_ranks_hold_and_send(tmp_path):
    run = recorded(tmp_path / "run", r.whole_run(num_ranks=2))
    plans = [
        kinds.column_wise(spec, 2) if spec.name.endswith("qkv") else kinds.row_wise(spec, [1]) for spec in r.specs()
    ]
    run.write_plan(ShardingPlan(2, tuple(plans)))
    plan = document(run)["runs"][0]["plan"]
    assert (plan["holders"], plan["num_holders"], plan["shown"], plan["is_chosen"]) == ("rank", 2, [0, 1], True)
    assert plan["bytes"][0] == [128 * 48 * 4] * 2 and plan["bytes"][1] == [0, 128 * 48 * 4]
    assert plan["regions"][0] == ["columns 0 to 47", "columns 48 to 95"] and plan["regions"][1] == [
        "nothing",
        "all rows",
    ]
    assert all(min(line) > 0 for line in plan["sent_forward"])
    parts = {part["name"]: part["bytes"] for part in plan["memory"]}
    assert parts["rows"] == [sum(column) for column in zip(*plan["bytes"], strict=True)]
    assert parts["optimiser states"] == [2 * held for held in parts["rows"]]  # AdamW's two moments
    run.plan_path.write_text("{}")
    assert document(run)["runs"][0]["plan"] is None


def test_tables_on_servers_are_drawn_by_server(tmp_path):
    overrides = ['servers.addresses=["a:1", "b:1"]', "optimizer.tables.rule=adam", "servers.insecure=true"]
    run = recorded(tmp_path / "run", r.whole_run(), overrides=overrides)
    plan = run.config.model
    assert plan.num_layers == 2
    run.write_plan(ShardingPlan(2, tuple(kinds.row_wise(spec, [index % 2]) for index, spec in enumerate(r.specs()))))
    found = document(run)["runs"][0]["plan"]
    assert (found["holders"], found["num_holders"], found["sent_forward"]) == ("server", 2, [])
    assert [part["name"] for part in found["memory"]] == ["rows", "optimiser states"]


def test_a_story_goes_on_while_the_run_does(tmp_path):
    run = recorded(tmp_path / "run", r.whole_run()[:10])
    report = Report(run.path)
    before, version = report.document(), report.version
    assert report.version == version
    later = recorded(tmp_path / "later", r.whole_run()[:14]).metrics_path.read_text().splitlines(keepends=True)
    with run.metrics_path.open("a") as file:
        file.writelines(later[10:])
    assert report.version != version
    assert report.document()["runs"][0]["step"] > before["runs"][0]["step"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.toml"):
        Report(tmp_path)
    assert isinstance(Run(recorded(tmp_path / "run", [])).story(), dict)

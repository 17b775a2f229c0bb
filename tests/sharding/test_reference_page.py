"""The reference page of plans: its example loads, and its tables name every key there is."""

import json
import re
from dataclasses import fields
from pathlib import Path

from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.table_plan import KINDS
from mfdist.sharding.topology import Topology
from tests.sharding.models import memoryformer, workload

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "plans.md").read_text("utf-8")


def named(title):
    """Return the words in code of a section."""
    section = PAGE.split(f"## {title}")[1].split("\n## ")[0]
    return set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", section, flags=re.DOTALL)))


def test_the_example_is_a_plan():
    plan = ShardingPlan.from_json(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    assert {table.kind for table in plan.tables} == {"column_wise", "row_wise", "grid"}
    assert ShardingPlan.from_json(plan.to_json()) == plan


def test_every_key_is_named():
    plan = set(json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])["tables"][0])
    assert plan | set(KINDS) <= named("A plan")
    assert {field.name for field in fields(Topology)} <= named("A topology")


def test_every_key_of_the_commands_document_is_named():
    from mfdist.launch.planning import Question, describe
    from mfdist.sharding.topology import h100

    specs, loads = memoryformer()
    question = Question(name="x", specs=specs, workload=workload(loads))
    document = describe(question, question.answer(h100(4, memory_bytes=1_000_000)))
    keys = {*document, *document["tables"][0], *document["tables"][0]["ranks"][0], *document["advice"]}
    keys |= set(document["tables"][0]["options"][0]) | set(document["advice"]["changes"][0])
    assert keys <= named("What `mfdist plan --json` writes")

"""The JSON form: what a person may leave out, and what is said where it is wrong."""

import json

import pytest

from mfdist.errors import ConfigError
from mfdist.sharding.kinds import column_wise, grid, row_wise, table_wise
from mfdist.sharding.plan import ShardingPlan
from mfdist.spec import TableSpec

SPEC = TableSpec(name="t", num_rows=12, row_dim=8)
TABLE = {"name": "t", "num_rows": 12, "row_dim": 8, "dtype": "float32", "kind": "row_wise"}


def document(table, **changes):
    return json.dumps({"format": "mfdist-plan", "version": 1, "world_size": 4, "tables": [table], **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, row_wise(SPEC, 4)),
        ({"rows": 4}, row_wise(SPEC, 4)),
        ({"owners": [2, 1]}, row_wise(SPEC, [2, 1])),
        ({"owners": [2, 1], "rows": [0, 1, 12]}, row_wise(SPEC, [2, 1], cuts=(0, 1, 12))),
        ({"kind": "column_wise"}, column_wise(SPEC, 4)),
        ({"kind": "table_wise", "code_stride": 3}, table_wise(SPEC, 4, 3)),
        ({"kind": "table_wise", "owners": [3]}, table_wise(SPEC, [3], 0)),
        ({"kind": "grid", "rows": 2, "columns": 2}, grid(SPEC, 2, 2)),
    ],
)
def test_what_is_even_may_be_left_out(changes, expected):
    assert ShardingPlan.from_json(document({**TABLE, **changes})).table("t") == expected


def test_a_plan_reads_as_one_line_a_table():
    lines = ShardingPlan(4, (grid(SPEC, 2, 2, deduplicate=False),)).to_json().splitlines()
    assert lines == [
        '{"format": "mfdist-plan", "version": 1, "world_size": 4, "tables": [',
        '{"name": "t", "num_rows": 12, "row_dim": 8, "dtype": "float32", "kind": "grid", "rows": 2, "columns": 2, '
        '"deduplicate": false}',
        "]}",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a plan must be JSON"),
        ("[]", '"format": "mfdist-plan"'),
        ("{}", '"format": "mfdist-plan"'),
        (document(TABLE, version=2), "reads version 1 of plans; got 2"),
        (document(TABLE, world_size="4"), "world_size has the wrong type"),
        (document(TABLE, world_size=True), "world_size has the wrong type"),
        (document(TABLE, world_size=0), "world_size=0"),
        (document(TABLE, tabels=[]), 'unknown key "tabels"'),
        (document(7), "must be a JSON object; got 7 for table 0"),
        (document({"name": "t"}), 'key "num_rows" is missing in table "t" of the plan'),
        (document({**TABLE, "kin": 1}), 'unknown key "kin" in table "t"'),
        (document({**TABLE, "kind": "rows"}), 'got "rows" for table "t"'),
        (document({**TABLE, "dtype": "int8"}), 'got "int8"'),
        (document({**TABLE, "rows": 0}), "got 0"),
        (document({**TABLE, "rows": [0, 1.5, 12]}), "whole numbers"),
        (document({**TABLE, "rows": 3}), "4 owners for 3 parts"),
        (document({**TABLE, "owners": [0, 9]}), r"ranks in \[0, 4\); got 9"),
        (document({**TABLE, "code_stride": 3}), "leave it out"),
        (document({**TABLE, "kind": "table_wise", "code_stride": 5}), "must divide num_rows"),
        (document({**TABLE, "num_rows": 0}), "at least one row"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ShardingPlan.from_json(text)
    assert "\n" not in str(caught.value)

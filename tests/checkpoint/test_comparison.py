from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mfdist.checkpoint.comparison import Difference, compare_attributes, compare_steps
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.checkpoint.step_files import StepFiles

State = Callable[..., CheckpointState]
GOLDEN = Path(__file__).parents[1] / "compat"


def compared(first: Path, second: Path) -> list[Difference]:
    with StepFiles(first) as one, StepFiles(second) as other:
        return compare_steps(one, other)


def test_a_step_does_not_differ_from_itself(directory: CheckpointDirectory, small_state: State) -> None:
    first, second = (directory.save(replace(small_state(1), step=step)) for step in (1, 2))
    assert compared(first.path, second.path) == []


def test_rows_that_changed_are_named(directory: CheckpointDirectory) -> None:
    weight = torch.randn(16384, 1024)

    def save(step: int) -> Path:
        tables = {"t": TableState(weight=weight)}
        return directory.save(CheckpointState(step=step, tables=tables, dense={}, attributes={})).path

    first = save(1)
    weight[5000] += 1
    [difference] = compared(first, save(2))
    assert (difference.table, difference.array, difference.kind) == ("t", "weight", "values")
    assert difference.rows == (4096, 6144)
    assert difference.changed_bytes * 8 == difference.num_bytes


def test_arrays_that_come_go_or_change_shape_are_named(directory: CheckpointDirectory, small_state: State) -> None:
    state = small_state(1)
    first = directory.save(state).path
    dense = {"model/head.weight": torch.zeros(8, 4), "new": torch.zeros(1), "rng/cpu": state.dense["rng/cpu"]}
    second = directory.save(replace(state, step=2, dense=dense)).path
    found = {difference.array: difference.kind for difference in compared(first, second)}
    assert found == {
        "model/head.weight": "shape or dtype",
        "optimizer/step": "only in the first",
        "new": "only in the second",
    }


def test_the_same_values_in_another_format_do_not_differ() -> None:
    steps = [GOLDEN / f"format-{version}" / "step-000000007" for version in (1, 2)]
    assert compared(*steps) == []


def test_attributes_differ_by_dotted_key() -> None:
    first = {"a": 1, "b": {"c": [1, 2], "d": "x"}}
    second = {"a": 1, "b": {"c": [1, 3], "d": "x"}, "e": None}
    assert compare_attributes(first, second) == {"b.c": ([1, 2], [1, 3])}
    assert compare_attributes(first, {}) == {"a": (1, None), "b": (first["b"], None)}

"""Steps as runs, against a set."""

from hypothesis import given
from hypothesis import strategies as st

from mfdist.table_server.step_set import StepSet


@given(steps=st.lists(st.integers(0, 12), max_size=40), through=st.integers(-1, 13))
def test_steps_are_a_set(steps: list[int], through: int) -> None:
    known, oracle = StepSet(), set[int]()
    for step in steps:
        assert known.add(step) == (step not in oracle)
        oracle.add(step)
    known.forget(through)
    for step in range(14):
        assert known.add(step) == (step not in oracle or step <= through)

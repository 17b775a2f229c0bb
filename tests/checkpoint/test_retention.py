import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.checkpoint.retention import Retention
from mfdist.errors import ConfigError


@given(st.sets(st.integers(0, 500)), st.integers(1, 5), st.integers(0, 7))
def test_the_last_and_the_divisible_are_kept(steps: set[int], keep_last: int, keep_every: int) -> None:
    outdated = Retention(keep_last=keep_last, keep_every=keep_every).outdated(steps)
    kept = steps - set(outdated)
    assert outdated == sorted(set(outdated))
    assert set(outdated) <= steps
    assert kept >= set(sorted(steps)[-keep_last:])
    for step in set(sorted(steps)[:-keep_last]):
        assert (step in kept) == (keep_every > 0 and step % keep_every == 0)


@given(st.sets(st.integers(0, 500)), st.sets(st.integers(0, 500)), st.integers(1, 5))
def test_steps_that_are_not_sound_do_not_count(steps: set[int], others: set[int], keep_last: int) -> None:
    sound = steps - others
    outdated = Retention(keep_last=keep_last).outdated(steps, lambda step: step in sound)
    if len(sound) < keep_last:
        assert outdated == []
    else:
        assert outdated == sorted(step for step in steps if step < sorted(sound)[-keep_last])


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_last": 1, "keep_every": -1}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="keep_"):
        Retention(**wrong)

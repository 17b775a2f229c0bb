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


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_last": 1, "keep_every": -1}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="keep_"):
        Retention(**wrong)

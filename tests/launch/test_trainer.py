import pytest

from mfdist.launch.trainer import all_gpus


@pytest.mark.parametrize(
    ("own", "shown", "found", "expected"),
    [
        (["2"], "2", 4, ("0,1,2,3", 2)),
        (["0"], "0", 1, ("0", 0)),
        (["5"], "5", 4, ("5", 0)),  # numbered otherwise than the host's devices
        (["1"], "", 4, ("", 1)),  # Ray was told to narrow nothing
        (["1"], "", 0, ("", 0)),  # another maker's GPU, which Ray shows alone by another variable
        (["MIG-7a0c"], "", 4, ("", 0)),
        (["3"], "1,3", 4, ("1,3", 1)),
        (["1"], "3", 4, ("3", 0)),
        (["0", "1"], "0,1", 4, ("0,1", 0)),
        (["MIG-7a0c"], "MIG-7a0c", 4, ("MIG-7a0c", 0)),
        (["0"], "0", 0, ("0", 0)),
    ],
)
def test_a_trainer_sees_all_gpus_of_its_host_and_knows_its_own(own, shown, found, expected):
    """They write into each other's memory only where both see both."""
    assert all_gpus(own, shown, found) == expected

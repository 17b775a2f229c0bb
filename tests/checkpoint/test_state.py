import pytest
import torch

from mfdist.checkpoint.state import CheckpointState, TableState
from mfdist.errors import ConfigError


@pytest.mark.parametrize(
    "attributes",
    [{"loss": float("nan")}, {"pair": (1, 2)}, {"by_id": {1: 2}}, {"tensor": torch.zeros(1)}],
    ids=["nan", "tuple", "integer key", "tensor"],
)
def test_attributes_that_json_would_change_are_refused(attributes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="attributes"):
        CheckpointState(step=0, tables={}, dense={}, attributes=attributes)  # type: ignore[arg-type]


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="got -1"):
        CheckpointState(step=-1, tables={}, dense={}, attributes={})


def test_a_table_has_two_dimensions() -> None:
    with pytest.raises(ConfigError, match=r"\[num_rows, row_dim\]"):
        TableState(weight=torch.zeros(3))


@pytest.mark.parametrize("state", [torch.zeros(()), torch.zeros(4)], ids=["0-d", "other rows"])
def test_an_optimiser_state_has_the_rows_of_its_table(state: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="num_rows=3"):
        TableState(weight=torch.zeros(3, 2), optimizer={"sum": state})


def test_an_optimiser_state_cannot_take_the_place_of_the_weight() -> None:
    with pytest.raises(ConfigError, match="'weight'"):
        TableState(weight=torch.zeros(3, 2), optimizer={"weight": torch.zeros(3, 2)})

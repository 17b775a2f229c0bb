"""What messages say of a row optimiser is what it is made from again."""

import dataclasses

import pytest
import torch

from mfdist import RowAdagrad, RowAdam, RowSGD
from mfdist.table_server.messages import optimizer_message, optimizer_of


@pytest.mark.parametrize(
    "optimizer",
    [
        RowSGD(lr=0.5, weight_decay=0.25, seed=3),
        RowAdagrad(lr=0.5, weight_decay=0.25, seed=3, eps=0.125, decay=0.75),
        RowAdagrad(lr=0.5),
        RowAdam(lr=0.5, weight_decay=0.25, seed=3, eps=0.125, betas=(0.5, 0.75), state_dtype=torch.bfloat16),
        RowAdam(lr=0.5, state_dtype=torch.uint8),
    ],
)
def test_a_row_optimizer_comes_back_as_it_was(optimizer) -> None:
    assert dataclasses.asdict(optimizer_of(optimizer_message(optimizer))) == dataclasses.asdict(optimizer)


def test_a_client_from_before_decay_trains_plain_adagrad() -> None:
    message = optimizer_message(RowAdagrad(lr=0.5))
    message.ClearField("beta2")
    assert optimizer_of(message).decay == 1.0

"""Movement of rows since they were drawn, whichever part of a large table is looked at."""

import pytest
import torch
from torch import nn

from mfdist.layers import MemoryLayer
from mfdist.tables.quantized import QuantizedTable
from mfdist.training.row_movement import NUM_TILES, ROWS_A_TILE, RowMovement


@pytest.mark.parametrize(
    ("in_features", "bits", "dtype"), [(12, 2, torch.float32), (32, 8, torch.bfloat16), (24, 12, torch.float32)]
)
def test_rows_that_were_just_drawn_have_not_moved(in_features, bits, dtype):
    layer = MemoryLayer(in_features, 300, bits, table_dtype=dtype)
    movement = RowMovement(layer).measure()["memory"]
    assert (movement.moved == 0).all()
    assert 1 <= len(movement.row_ids) <= NUM_TILES * ROWS_A_TILE
    assert len(set(movement.row_ids.tolist())) == len(movement.row_ids) and movement.row_ids.max() < layer.hash.num_rows
    # The sample reaches over the whole table.
    assert movement.row_ids.max() >= layer.hash.num_rows * (1 - 2 / NUM_TILES)


def test_movement_is_the_distance_as_a_multiple_of_the_norm():
    layer = MemoryLayer(16, 64, 8)
    movement = RowMovement(layer)
    before = layer.table.weight.detach().clone()
    with torch.no_grad():
        layer.table.weight[::2] *= -1
        layer.table.weight[1::4] += 3.0
    found = movement.measure()["memory"]
    expected = (layer.table.weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    assert found.moved == pytest.approx(expected[found.row_ids].numpy(), rel=1e-5)
    assert {0.0, 2.0} <= set(found.moved.round(5).tolist())


def test_a_table_that_was_not_drawn_is_left_out():
    layers = nn.Sequential(MemoryLayer(8, 8, 4, name="drawn"), MemoryLayer(8, 8, 4, name="given"))
    layers[1].table = QuantizedTable.of(layers[1].table)
    assert set(RowMovement(layers).measure()) == {"drawn"}

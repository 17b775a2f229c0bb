"""Row optimisers' settings and states: shapes, saving and going on, parts of a table, and learning."""

import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.layers import MemoryLayer
from mfdist.optim import RowAdagrad, RowAdam, RowSGD, RowState
from mfdist.spec import Region


def region(rows=(0, 6), columns=(0, 4)):
    return Region(rows=rows, columns=columns)


def test_states_are_the_rules_own():
    rows = torch.zeros(6, 4, dtype=torch.bfloat16)
    assert RowState(RowSGD(lr=1.0), rows, region()).tensors == {}
    adagrad = RowState(RowAdagrad(lr=1.0), rows, region()).tensors
    assert {name: (tuple(each.shape), each.dtype) for name, each in adagrad.items()} == {
        "accumulator": ((6,), torch.float32)
    }
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        adam = RowState(RowAdam(lr=1.0, state_dtype=dtype), rows, region()).tensors
        assert {name: (tuple(each.shape), each.dtype) for name, each in adam.items()} == {
            "exp_avg": ((6, 4), dtype),
            "exp_avg_sq": ((6, 4), dtype),
        }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowSGD(lr=-0.1), "learning rate must be 0 or more; got -0.1"),
        (lambda: RowSGD(lr=float("nan")), "got nan"),
        (
            lambda: RowAdam(lr=0.1, state_dtype=torch.float16),
            r"kept in fp32, bf16 or uint8 \(a byte each\); got torch.float16",
        ),
        (lambda: RowAdam(lr=0.1, betas=(0.9, 1.0)), r"betas in \[0, 1\)"),
        (lambda: RowAdagrad(lr=0.1, seed=-1), "seed of stochastic rounding"),
        (lambda: RowAdagrad(lr=0.1, decay=0.0), r"decay must lie in \(0, 1\]; got 0.0"),
        (lambda: RowAdagrad(lr=0.1, decay=1.5), "got"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "optimizer",
    [
        RowAdagrad(lr=0.1, decay=0.5),
        RowAdam(lr=0.1, state_dtype=torch.bfloat16),
        RowAdam(lr=0.1, state_dtype=torch.uint8),
    ],
)
def test_saved_and_loaded_it_goes_on_bit_for_bit(optimizer):
    rows, grads = torch.randn(6, 4).bfloat16(), torch.randn(5, 6, 4)
    state = RowState(optimizer, rows, region())
    for grad in grads[:3]:
        state.update(rows, grad)
    again_rows, again = rows.clone(), RowState(optimizer, rows, region())
    again.load({name: tensor.clone() for name, tensor in state.tensors.items()}, state.num_updates)
    for each, its_rows in ((state, rows), (again, again_rows)):
        for grad in grads[3:]:
            each.update(its_rows, grad)
    assert torch.equal(rows, again_rows) and again.num_updates == 5


def test_states_of_another_optimiser_are_refused():
    state = RowState(RowAdagrad(lr=0.1), torch.zeros(6, 4), region())
    for wrong in ({}, {"accumulator": torch.zeros(5)}, {"exp_avg": torch.zeros(6, 4)}):
        with pytest.raises(ConfigError, match="must be those of RowAdagrad"):
            state.load(wrong, 3)
    assert state.num_updates == 0


@pytest.mark.parametrize(("kept", "saved"), [(torch.uint8, torch.float32), (torch.bfloat16, torch.uint8)])
def test_bytes_are_not_taken_for_numbers(kept, saved):
    state = RowState(RowAdam(lr=0.1, state_dtype=kept), torch.zeros(6, 4), region())
    with pytest.raises(ConfigError, match=rf'"exp_avg" must have been kept in {kept}, .*got {saved}'):
        state.load({name: torch.ones(6, 4, dtype=saved) for name in state.tensors}, 3)
    assert state.num_updates == 0 and not any(tensor.any() for tensor in state.tensors.values())


def test_parts_of_a_table_are_trained_as_the_whole():
    """Rows and columns cut, the columns with the whole row's squares: rounding knows where each part lies."""
    from mfdist.kernels import squared_sums

    optimizer, rows, grads = RowAdagrad(lr=0.5, seed=3), torch.randn(6, 64).bfloat16(), torch.randn(6, 64)
    grads = grads.mul(8).round().div(8)  # so that sums of squares are exact in any order
    whole_rows, whole = rows.clone(), RowState(optimizer, rows, region(columns=(0, 64)))
    whole.update(whole_rows, grads)
    cuts = [((0, 2), (0, 24)), ((0, 2), (24, 64)), ((2, 6), (0, 24)), ((2, 6), (24, 64))]
    for (top, bottom), (left, right) in cuts:
        part = rows[top:bottom, left:right].contiguous()
        state = RowState(optimizer, part, region((top, bottom), (left, right)))
        squares = (squared_sums(grads[top:bottom, :24]) + squared_sums(grads[top:bottom, 24:])) / 64
        state.update(part, grads[top:bottom, left:right], mean_squares=squares)
        torch.testing.assert_close(state.tensors["accumulator"], whole.tensors["accumulator"][top:bottom])
        agreeing = (part == whole_rows[top:bottom, left:right]).float().mean()
        assert agreeing > 0.98  # a last bit of the accumulator may differ, and turn a rounding now and then


@pytest.mark.parametrize(
    "optimizer",
    [
        RowSGD(lr=10.0),
        RowAdagrad(lr=0.3),
        RowAdam(lr=0.05, state_dtype=torch.bfloat16),
        RowAdam(lr=0.05, state_dtype=torch.uint8),
    ],
)
def test_a_layer_learns_with_its_table_fused(optimizer):
    layer = MemoryLayer(12, 7, bits=4, dtype=torch.bfloat16, bias=False)
    layer.table.fuse(optimizer)
    x, goal = torch.randn(24, 12), torch.randn(24, 7)
    losses = []
    for _ in range(100):
        loss = (layer(x) - goal).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0] and layer.table.weight.grad is None

"""One layer beside the other: what is timed is right, and the crossover lies where the times say."""

import dataclasses

import pytest
import torch

from mfdist.benchmarks.layers import LayerSpeed, crossover, measure_layers


def speeds(**ratios: float) -> list[LayerSpeed]:
    """Return speeds at numbers of tokens, given as t1=ratio and so on."""
    return [
        LayerSpeed(
            in_features=8,
            out_features=8,
            num_tokens=int(name[1:]),
            memory_us=10.0,
            linear_us=10.0 * ratio,
            memory_spread=0.01,
            linear_spread=0.01,
            memory_error=0.0,
            linear_error=0.0,
            tolerance=1e-6,
        )
        for name, ratio in ratios.items()
    ]


def test_the_crossover_lies_between_the_numbers_that_were_measured() -> None:
    assert crossover(speeds(t1=4.0, t16=2.0, t64=0.5, t256=0.25)) == pytest.approx(32)
    assert crossover(speeds(t1=4.0, t16=1.0, t64=0.5)) == pytest.approx(16)
    assert crossover(speeds(t1=0.9, t16=2.0)) == 0
    assert crossover(speeds(t1=4.0, t16=2.0)) is None
    assert crossover(speeds(t1=4.0)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_layers_are_right_and_timed(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = list(measure_layers(24, 40, (1, 5), bits=4, dtype=dtype, seconds=0.0))
    assert [each.num_tokens for each in found] == [1, 5]
    for each in found:
        assert not each.is_wrong
        assert each.memory_us > 0 and each.ratio == each.linear_us / each.memory_us
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_wrong_is_told_and_nan_is_wrong() -> None:
    (right,) = speeds(t1=2.0)
    assert not right.is_wrong
    for field in ("memory_error", "linear_error"):
        for error in (1e-5, float("nan")):
            assert dataclasses.replace(right, **{field: error}).is_wrong  # type: ignore[arg-type]

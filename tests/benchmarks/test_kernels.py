"""The benchmark of the kernels: what is right is timed, what is wrong is not, and everything is offered."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfdist.benchmarks import ceilings, kernels
from mfdist.benchmarks.contender import DIFFERS, Comparison, Contender, Distance, Result
from mfdist.benchmarks.kernels import Selection, measure
from mfdist.benchmarks.lookup_case import CASES, LookupCase, LookupTensors
from mfdist.benchmarks.timing import Work
from mfdist.errors import ConfigError

CEILINGS = ceilings.Ceilings(copy_bytes_per_s=2e9, read_bytes_per_s=1e9)


def summing(call: Callable[[Tensor], Tensor]) -> Comparison:
    """Return a comparison of one contender, which should add a thousand ones up."""
    ones = torch.ones(1000)

    def outputs() -> tuple[Tensor]:
        return (call(ones),)

    contender = Contender(
        work=Work(lambda _: outputs()),
        outputs=outputs,
        distances=lambda outputs: [Distance(torch.float32, [(outputs[0], torch.tensor(1000.0))])],
        num_bytes=ones.nbytes,
        repeats=True,
    )
    return Comparison(op="sum", case="ones", ceiling="read", contenders={"torch": lambda: contender})


def compared(comparison: Comparison, repeats: int = 3) -> Result:
    (result,) = kernels._compare(comparison, ["torch"], "cpu", CEILINGS, 0.001, repeats)
    return result


def test_what_is_right_is_timed() -> None:
    result = compared(summing(torch.sum))
    assert not result.is_wrong and result.error == 0.0 and result.repeats == 3
    assert result.median_us is not None and result.median_us > 0
    assert result.bytes_per_s == pytest.approx(4000 / result.median_us * 1e6)
    assert result.share_of_ceiling == pytest.approx(result.bytes_per_s / CEILINGS.read_bytes_per_s)


@pytest.mark.parametrize("wrong", [lambda ones: ones.sum() + 1, lambda ones: ones.sum() * math.nan, lambda ones: ones])
def test_what_is_wrong_is_not_timed(wrong: Callable[[Tensor], Tensor]) -> None:
    result = compared(summing(wrong))
    assert result.is_wrong and result.median_us is None and result.share_of_ceiling is None


def test_other_bits_in_a_repetition_are_wrong() -> None:
    calls: list[None] = []

    def unsteady(ones: Tensor) -> Tensor:
        calls.append(None)
        return ones.sum() + (1e-4 if len(calls) == 3 else 0.0)

    assert compared(summing(unsteady), repeats=1).note == ""
    calls.clear()
    result = compared(summing(unsteady))
    assert result.note == DIFFERS and result.is_wrong and result.median_us is None


def test_too_little_memory_is_told() -> None:
    def greedy(ones: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no")

    result = compared(summing(greedy))
    assert result.note == "needs more memory than there is" and result.median_us is None and not result.is_wrong


def test_a_distance_adds_parts_up() -> None:
    got, expected = torch.randn(10, 4), torch.randn(10, 4)
    parts = Distance(torch.bfloat16, [(got[:3], expected[:3]), (got[3:], expected[3:])])
    assert parts.relative == pytest.approx(float((got - expected).norm() / expected.norm()), rel=1e-5)
    assert parts.tolerance == 8e-3 and not parts.is_close
    assert Distance(torch.float32).is_close


@pytest.mark.parametrize("name", ["demo-ffn2", "base-decode", "block-base", "demo-block"])
def test_a_whole_case_is_right(name: str) -> None:
    """Everything that is offered for a case is made, checked and not timed."""
    results = list(measure("cpu", CEILINGS, Selection(cases=(name,)), seconds=0.0, repeats=1))
    assert {result.case for result in results} == {name} and len(results) >= 2
    for result in results:
        assert not result.is_wrong and result.error is not None and result.median_us is None, result
        assert result.repeats == (1 if result.impl.startswith("mfdist") else 0)


def test_patterns_choose() -> None:
    selection = Selection(ops=("gather_sum",), cases=("demo-ffn?",), impls=("torch", "mfdist-fp32"))
    found = [(result.case, result.impl) for result in measure("cpu", CEILINGS, selection, seconds=0.0, repeats=0)]
    impls = ("mfdist-fp32", "torch-fp32", "torch-bf16")
    assert found == [(case, impl) for case in ("demo-ffn1", "demo-ffn2") for impl in impls]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_selection_of_nothing_lists_what_there_is(device: str) -> None:
    with pytest.raises(ConfigError, match=r"got --case base-qvk; operations are sign_hash, .*; cases are .*base-ffn2"):
        Selection(cases=("base-qvk",)).check(device)
    Selection(cases=("base-ffn2",), impls=("torch-bf16",)).check(device)


def test_skewed_ids_follow_zipfs_law_and_lie_anywhere() -> None:
    case = LookupCase(4096, 8, 1000, 1, is_skewed=True)
    counts = torch.bincount(LookupTensors(case, "cpu").row_ids[0].flatten().long(), minlength=1000)
    ranked = counts.sort(descending=True).values.double()
    assert counts.numel() == 1000
    assert float(ranked[0] / ranked[9]) == pytest.approx(10**1.2, rel=0.2)
    assert counts.argsort(descending=True)[:4].tolist() != [0, 1, 2, 3]


@pytest.mark.parametrize("device", list(CASES))
def test_ids_fit_their_tables(device: str) -> None:
    for case in CASES[device].values():
        one = LookupCase(3, case.num_lookups, case.rows_each, 1, case.is_shared, case.is_skewed)
        ids = LookupTensors(one, "cpu").row_ids[0]
        assert int(ids.long().max()) < case.rows_each and (ids.dtype == torch.int64) == case.is_shared
        assert case.num_rows == case.rows_each * (1 if case.is_shared else case.num_lookups)

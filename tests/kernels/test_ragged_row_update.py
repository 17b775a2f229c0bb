"""ragged_row_update on the CPU and a GPU: against the reference, and beside the update of tokens that all have K."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels import RowRule, fused_row_update, ragged_row_update
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.kernels.lookups import make_lookup
from tests.kernels.ragged_lookups import TokenList, make_token_list
from tests.kernels.updates import LR, RULES, STEP, Updated, assert_close, make_updated

OFFSETS = (1 << 40, 3)
SGD = RULES[0]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)


def update(got: Updated, listed: TokenList, rule: RowRule, device: str = "cpu") -> Tensor:
    on_device = (each.to(device) for each in (listed.row_ids, listed.runs, listed.scores, listed.grad_output))
    return ragged_row_update(
        got.table, got.state, *on_device, listed.num_lookups, rule, LR.to(device), STEP.to(device),
        row_offset=OFFSETS[0], column_offset=OFFSETS[1], name="t",
    )  # fmt: skip


def check(listed: TokenList, rule: RowRule, device: str = "cpu", state_dtype: torch.dtype = torch.float32) -> None:
    before = make_updated(listed.table, rule, state_dtype)
    results = []
    for _ in range(2):
        got = Updated(before.table.to(device, copy=True), [each.to(device, copy=True) for each in before.state])
        results.append((update(got, listed, rule, device), got.table, *got.state))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    expected_scores, expected = listed.reference_update(before, rule, OFFSETS)
    assert results[0][0].shape == listed.scores.shape
    assert relative_error(results[0][0].cpu().numpy(), expected_scores.numpy()) <= TOLERANCES["float32"]
    assert_close(got, expected)
    untouched = torch.ones(listed.table.shape[0], dtype=torch.bool)
    untouched[listed.row_ids.long()] = False
    for one, other in zip([got.table, *got.state], [before.table, *before.state], strict=True):
        assert torch.equal(one.cpu()[untouched], other[untouched])


@every_rule
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (63, 5, 20, 40), (20, 4, 5000, 33), (0, 3, 8, 8)])
def test_sizes(sizes: tuple[int, int, int, int], rule: RowRule) -> None:
    check(make_token_list(*sizes, id_dtype=torch.int64), rule)
    check(make_token_list(*sizes, dtype=torch.bfloat16), rule, state_dtype=torch.bfloat16)


@every_rule
def test_tokens_that_have_all_lookups_give_the_bits_of_the_fused_update(rule: RowRule) -> None:
    lookup = make_lookup(50, 3, 20, 100, dtype=torch.bfloat16, is_compact=False, id_dtype=torch.int32)
    runs = torch.full((50,), 3)
    listed = TokenList(lookup.table, lookup.row_ids.view(-1), runs, lookup.scores.view(-1), lookup.grad_output, 3)
    one, other = (make_updated(lookup.table, rule, torch.bfloat16) for _ in range(2))
    other = one.copy()
    grad_scores = fused_row_update(
        one.table, one.state, lookup.row_ids, lookup.scores, lookup.grad_output, rule, LR, STEP,
        row_offset=OFFSETS[0], column_offset=OFFSETS[1],
    )  # fmt: skip
    assert torch.equal(update(other, listed, rule), grad_scores.view(-1))
    for each, same in zip([one.table, *one.state], [other.table, *other.state], strict=True):
        assert torch.equal(each, same)


def test_what_does_not_fit() -> None:
    listed = make_token_list(6, 5, 8, 4)
    got = make_updated(listed.table, SGD)
    listed.row_ids[1] = 8
    with pytest.raises(RowIdError, match=r'row id 8 .*outside table "t"'):
        update(got, listed, SGD)
    assert torch.equal(got.table, listed.table)
    with pytest.raises(ConfigError, match="adam keeps 2 states"):
        update(got, listed, RULES[2])
    with pytest.raises(ConfigError, match=r"scores \[M\]"):
        update(got, replace(listed, scores=listed.scores[1:]), SGD)


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, rule: RowRule) -> None:
    # Rows that are looked up often, in slices, by windows, in long runs, and none; one often among many; by token.
    for sizes in ((700, 5, 64, 300), (60, 7, 20, 1536), (90, 3, 5000, 640), (9000, 2, 3, 100), (0, 3, 8, 8)):
        check(make_token_list(*sizes, dtype=dtype), rule, "cuda")
    words = make_token_list(4000, 3, 50_000, 100, dtype=dtype)
    words.row_ids[::2] = 11
    check(words, rule, "cuda")
    check(make_token_list(70_000, 2, 40, 1040, dtype=dtype), rule, "cuda")


@pytest.mark.gpu
def test_numbers_that_do_not_fit_half_a_word_on_a_gpu() -> None:
    listed = make_token_list(63, 5, 20, 40)
    check(replace(listed, num_lookups=1 << 31), SGD, "cuda")

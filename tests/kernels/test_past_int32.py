"""More lookups than an int32 counts, which only a GPU has the memory and the patience for."""

import pytest
import torch

from mfdist.kernels import RowRule, check_errors, fused_row_update, gather_sum, row_gradient

NUM_TOKENS, NUM_LOOKUPS, NUM_CODES = (1 << 25) + 3, 64, 256


@pytest.mark.gpu
def test_more_lookups_than_an_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 75 << 30:
        pytest.skip("it takes 75 GiB of free GPU memory")
    codes = torch.randint(0, NUM_CODES, (NUM_TOKENS, NUM_LOOKUPS), dtype=torch.uint8, device="cuda")
    assert codes.numel() > 1 << 31
    scores = torch.ones(NUM_TOKENS, NUM_LOOKUPS, device="cuda")
    scores[-1] = 2.0
    table = torch.ones(NUM_LOOKUPS * NUM_CODES, 1, device="cuda")
    out = gather_sum(table, codes, scores, NUM_CODES)
    assert (out[:-1] == NUM_LOOKUPS).all() and out[-1] == 2 * NUM_LOOKUPS
    grads = torch.ones(NUM_TOKENS, 1, device="cuda")
    grad_table, grad_scores = row_gradient(table, codes, scores, grads, NUM_CODES)
    assert (grad_scores == 1).all()
    del grad_scores
    counts = [torch.bincount(codes[:, k].long(), minlength=NUM_CODES) for k in range(NUM_LOOKUPS)]
    expected = torch.cat(counts)
    expected[torch.arange(NUM_LOOKUPS, device="cuda") * NUM_CODES + codes[-1].long()] += 1
    assert torch.equal(grad_table.flatten(), expected.float())
    lr, step = torch.ones(1, device="cuda"), torch.ones(1, dtype=torch.int64, device="cuda")
    grad_scores = fused_row_update(
        table, [], codes, scores, grads, RowRule(kind="sgd"), lr, step, code_stride=NUM_CODES
    )
    assert (grad_scores == 1).all()
    assert torch.equal(table.flatten(), 1 - expected.float())
    check_errors()

"""Runs the Triton kernels in Triton's interpreter against the references' oracle; test_triton starts it as a process.

The interpreter must be chosen before a kernel is defined. It rounds fp32 to bf16 towards zero, so bf16 gets twice the
tolerance here, and it takes about 0.1 ms an operation and program, so shapes are small.
"""

import sys

import numpy as np
import torch
import triton.language as tl

from mfdist.errors import RowIdError
from mfdist.kernels import check_errors
from mfdist.kernels.gather_sum import triton_impl as sums
from mfdist.kernels.hashed_gather_sum import Norm
from mfdist.kernels.hashed_gather_sum import triton_impl as hashed
from mfdist.kernels.hashed_gather_sum import triton_norm as norms
from mfdist.kernels.one_token_attention import triton_impl as attention
from mfdist.kernels.quantize import QuantizedRows, quantize, reference
from mfdist.kernels.ragged_gradient import triton_impl as ragged
from mfdist.kernels.row_gradient import triton_impl as gradients
from mfdist.kernels.row_gradient import triton_order as ordering
from mfdist.kernels.row_gradient import triton_pieces as pieces
from mfdist.kernels.row_gradient import triton_slices as slicing
from mfdist.kernels.row_gradient import triton_sort as sorts
from mfdist.kernels.row_gradient import triton_sums as summing
from mfdist.kernels.row_gradient.triton_ordered import ordered_lookups
from mfdist.kernels.sign_hash import triton_impl as hashes
from mfdist.testing import oracles
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.kernels.attentions import Attention, expected_attention, make_attention
from tests.kernels.lookups import RUNS_BY_EIGHT, Lookup, expected_gradients, expected_sum, make_lookup, make_runs
from tests.kernels.ragged_lookups import expected_of_list, make_list


def check(got: torch.Tensor, expected: object) -> None:
    kind = str(got.dtype).removeprefix("torch.")
    error = relative_error(got.double().numpy(), expected)  # type: ignore[arg-type]
    assert error <= TOLERANCES[kind] * (2 if kind == "bfloat16" else 1), (kind, error)


def check_lookup(lookup: Lookup) -> None:
    arguments = (lookup.table, lookup.row_ids, lookup.scores)
    check(sums.gather_sum(*arguments, lookup.code_stride, "t"), expected_sum(lookup))
    got = gradients.row_gradient(*arguments, lookup.grad_output, lookup.code_stride, "t")
    for one, expected in zip(got, expected_gradients(lookup), strict=True):
        check(one, expected)
    again = gradients.row_gradient(*arguments, lookup.grad_output, lookup.code_stride, "t")
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True))
    options = (lookup.code_stride, "t", torch.float32)
    grads, is_read, grad_scores = gradients.marked_row_gradient(*arguments, lookup.grad_output, *options)
    assert grads.dtype == torch.float32
    check(grads, expected_gradients(lookup)[0])
    ids = lookup.row_ids.long() + lookup.code_stride * torch.arange(lookup.row_ids.shape[1])
    assert torch.equal(is_read.nonzero().squeeze(1), ids.unique()) and torch.equal(grad_scores, got[1])
    if ids.numel():
        ahead = ordered_lookups(lookup.row_ids, lookup.scores, lookup.table.shape[0], lookup.code_stride, "t")
        ordered = gradients.marked_row_gradient(*arguments, lookup.grad_output, *options, ahead)
        assert all(torch.equal(one, two) for one, two in zip(ordered, (grads, is_read, grad_scores), strict=True))


def lookups() -> None:
    check_lookup(make_lookup(63, 3, 8, 40))
    check_lookup(make_lookup(40, 2, 8, 96, dtype=torch.bfloat16, id_dtype=torch.int32))
    check_lookup(make_lookup(37, 2, 9, 20, id_dtype=torch.uint16))
    check_lookup(make_lookup(40, 2, 8, 1, dtype=torch.float16, is_compact=False, id_dtype=torch.int64))
    check_lookup(make_lookup(3, 70, 1, 100))  # few tokens, more lookups than are read at a time
    for empty in (make_lookup(0, 3, 8, 8), make_lookup(5, 0, 8, 8)):
        check_lookup(empty)
    equal = make_lookup(63, 2, 4, 20, id_dtype=torch.int32)
    equal.row_ids.fill_(3)
    check_lookup(equal)
    check_lookup(make_lookup(6, 2, 2, 1000, dtype=torch.bfloat16))  # a slice with columns past the last
    check_lookup(make_lookup(6, 2, 2, 640))  # slices of two widths
    sums._SLICE_BYTES = 0  # as for a table whose slices fit no cache
    check_lookup(make_lookup(40, 2, 8, 96, dtype=torch.bfloat16, id_dtype=torch.int32))
    # As for many tokens and long runs.
    sums._STREAMED_OF_FEW = ()
    slicing._MOST_COLUMNS = slicing._COLUMNS_EACH = 32
    pieces._LENGTH = 8
    ordering._MIN_CHUNK = ordering._MIN_BINS = 16
    ordering._PLACED_TOGETHER = 8
    check_lookup(make_lookup(70, 2, 8, 40))
    check_lookup(make_lookup(70, 3, 2, 70, is_compact=False))
    check_lookup(equal)
    summing._ELEMENTS = tl.constexpr(32)  # slices of 32 columns go two lookups at a time, narrower ones more
    check_lookup(make_runs(RUNS_BY_EIGHT, 10, 80))  # 16, 32 and 32
    check_lookup(make_runs(RUNS_BY_EIGHT, 10, 60, dtype=torch.bfloat16))  # 32 and 28
    few_rows = make_lookup(70, 2, 2, 33, id_dtype=torch.int32)
    check_lookup(few_rows)
    ordering._MAX_COUNTED = 1  # as for codes too many to count
    check_lookup(few_rows)
    check_lookup(make_lookup(35, 2, 3, 20, id_dtype=torch.uint16))


def by_token() -> None:
    """The order in which pieces are summed changes no bit."""
    pieces._LENGTH, pieces._LENGTH_BY_TOKEN, pieces._GROUP = 8, 8, 16
    token_bits = pieces._TOKEN_BITS
    slicing._MOST_COLUMNS = slicing._COLUMNS_EACH = slicing._LEAST_COLUMNS = 16
    slicing._CACHED_BYTES, slicing._SPAN_BYTES = 1, 64
    # Runs of one length and of many; gaps where ids are bad are in `bad_ids`.
    for lookup in (
        make_lookup(70, 3, 3, 40),
        make_lookup(90, 2, 2, 24, is_compact=False),
        make_runs([70, 9, 31], 4, 33),
    ):
        arguments = (lookup.table, lookup.row_ids, lookup.scores, lookup.grad_output, lookup.code_stride, "t")
        slicing._LONG_RUN = 10**9
        wanted = gradients.row_gradient(*arguments)
        slicing._LONG_RUN = 1
        for pieces._TOKEN_BITS in (token_bits, 3):  # the second as of more tokens than their bits can tell apart
            check_windows(lookup)
            assert all(torch.equal(*both) for both in zip(gradients.row_gradient(*arguments), wanted, strict=True))
        check_lookup(lookup)


def check_windows(lookup: Lookup) -> None:
    """Each window is there once, and those of a group lie at the places of a stride in the order of their tokens."""
    ids, num_rows = lookup.row_ids, lookup.table.shape[0]
    ordered = ordered_lookups(ids, lookup.scores, num_rows, lookup.code_stride, "t")
    windows, num_windows = ordered.pieces.windows, ids.numel() // 8
    assert windows is not None and windows.numel() == ordered.pieces.num_windows
    num_groups = -(-num_windows // 16)
    for group in range(num_groups):
        found = windows[group::num_groups]
        found = found[found >= 0].long()
        assert found.sort().values.tolist() == list(range(16 * group, min(16 * group + 16, num_windows)))
        tokens = ordered.order.words[8 * found + 7] % (1 << 32) // ids.shape[1]
        told_apart = tokens >> max(0, ids.shape[0].bit_length() - pieces._TOKEN_BITS)
        assert torch.equal(told_apart, told_apart.sort().values)


def sorting() -> None:
    """Words are sorted by the bits asked for, whatever the others hold, and equal ones keep their order."""
    sorts._CHUNK, sorts._PLACED_TOGETHER = 16, 8
    for num_words, first_bit, num_bits in ((1, 0, 1), (16, 3, 2), (63, 21, 9), (100, 0, 20), (200, 40, 23)):
        words = torch.randint(0, (1 << first_bit + num_bits) - 1, (num_words,))
        words[: num_words // 2] = words[num_words - num_words // 2 :].clone()  # many are there twice
        words = torch.stack([words, words.flip(0)])
        order = (words >> first_bit).sort(stable=True).indices
        assert torch.equal(sorts.sort_by_bits(words.clone(), first_bit, num_bits), words.gather(1, order))
    check_lookup(make_lookup(70, 3, 40, 8, is_compact=False, id_dtype=torch.int32))
    ordering._MAX_COUNTED = 1  # as for codes too many to count
    check_lookup(make_lookup(70, 3, 256, 8))


def quantised() -> None:
    check_quantised()
    sums._SLICE_BYTES, sums._SCALED = 0, (32, 2)  # as of a table whose slices fit no cache
    check_quantised()
    sums._INT32_MAX = 0  # as of one with more rows than a word's half can name
    check_quantised()


def check_quantised() -> None:
    for kind in (torch.int8, torch.float8_e4m3fn):
        for lookup in (
            make_lookup(40, 3, 8, 40),  # many tokens, few, and rows that lie anywhere
            make_lookup(3, 70, 8, 100),
            make_lookup(40, 3, 8, 33, is_compact=False, id_dtype=torch.int64),
        ):
            rows = quantize(lookup.table, kind)
            arguments = (lookup.row_ids, lookup.scores, lookup.code_stride)
            for dtype in (torch.float32, torch.float16):
                got = sums.gather_sum(rows.as_bytes, *arguments, "t", scales=rows.scales, dtype=dtype)
                assert got.dtype == dtype
                check(got, reference.quantized_gather_sum(rows, *arguments).numpy())
    every = torch.arange(256, dtype=torch.uint8)  # every e4m3 value, read as torch reads it
    rows = QuantizedRows(every.view(torch.float8_e4m3fn).view(256, 1), torch.ones(256))
    ids, ones = torch.arange(256).view(256, 1), torch.ones(256, 1)
    got = sums.gather_sum(rows.as_bytes, ids, ones, 0, "t", scales=rows.scales, dtype=torch.float32)
    is_number = ~rows.values.float().isnan()
    assert torch.equal(got[is_number], rows.values.float()[is_number])
    empty = sums.gather_sum(rows.as_bytes, ids[:0], ones[:0], 0, "t", scales=rows.scales, dtype=torch.float16)
    assert empty.shape == (0, 1) and empty.dtype == torch.float16


def ragged_lookups() -> None:
    for num_lookups, dim, dtype in ((60, 40, torch.float32), (1, 1, torch.float16), (70, 100, torch.bfloat16)):
        listed = make_list(num_lookups, 9, 12, dim, dtype=dtype)
        for _ in range(2):
            got = ragged.ragged_gradient(*listed, dtype, "t")
            expected = expected_of_list(*listed)
            assert np.array_equal(got[0].numpy(), expected[0])
            check(got[1], expected[1])
            check(got[2], expected[2])
            ragged._COLUMNS = 32
    ragged._PIECE = 8  # of runs of 1, 15, 16, 17 and 40 lookups, the last three are cut
    table, row_ids, tokens, scores, grads = make_list(89, 9, 5, 40)
    row_ids.copy_(torch.arange(5).repeat_interleave(torch.tensor([1, 15, 16, 17, 40]))[torch.randperm(89)])
    listed = (table, row_ids, tokens, scores, grads)
    got, again = (ragged.ragged_gradient(*listed, torch.float32, "t") for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True))
    expected = expected_of_list(*listed)
    assert np.array_equal(got[0].numpy(), expected[0])
    check(got[1], expected[1])
    alone = row_ids == 4  # a row's bits are its own, whatever else is in the list
    of_one = ragged.ragged_gradient(table, row_ids[alone], tokens[alone], scores[alone], grads, torch.float32, "t")
    assert torch.equal(of_one[1][0], got[1][4])


def hashing() -> None:
    for bits, dtype, score in (
        (8, torch.float32, "paper"),
        (5, torch.float32, "released"),
        (24, torch.float32, "paper"),
        (10, torch.bfloat16, "released"),
    ):
        x = torch.randn(37, 3 * bits).to(dtype)
        codes, scores = hashes.sign_hash(x, bits, score, 1.5)
        expected_codes, expected = oracles.sign_hash(x.double().numpy(), bits, score, 1.5)
        assert np.array_equal(codes.numpy(), expected_codes)
        assert codes.dtype == (torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32)
        check(scores, expected)
        grad = torch.randn(37, 3)
        got = hashes.sign_hash_gradient(x, grad, bits, score, 1.5)
        check(got, oracles.sign_hash_gradient(x.double().numpy(), grad.double().numpy(), bits, score, 1.5))
    for num_tokens, bits, num_lookups, dim, dtype in ((3, 8, 3, 40, torch.float32), (2, 5, 140, 33, torch.bfloat16)):
        check_hashed(torch.randn(num_tokens, num_lookups * bits).to(dtype), bits, dim)
    hashed._TILES = ()
    check_hashed(torch.randn(3, 70 * 4), 4, 100)
    check_hashed(torch.randn(40, 2 * 4), 4, 8)  # hashed first, then looked up
    for is_centred in (False, True):
        for dtype in (torch.float32, torch.float16):
            check_normed((torch.randn(3, 20 * 5) + 0.2).to(dtype), 5, 33, is_centred=is_centred)  # in one kernel
            check_normed((torch.randn(3, 70 * 8) + 0.2).to(dtype), 8, 40, is_centred=is_centred)  # in one before
        check_normed(torch.randn(40, 2 * 4), 4, 8, is_centred=is_centred)
        norms._BLOCK = 64  # as for more activations than are read at a time
        check_normed(torch.randn(2, 70 * 5), 5, 20, is_centred=is_centred)
    special = torch.tensor([[0.0, -0.0, float("nan"), -1.0, float("inf"), 1.0]])
    codes, scores = hashes.sign_hash(special, 2, "paper", 1.0)
    assert codes.tolist() == [[3, 0, 3]]
    assert scores.isnan().tolist() == [[False, True, False]]
    slopes = hashes.sign_hash_gradient(special, torch.ones(1, 3), 2, "paper", 1.0)
    assert slopes[0, :2].tolist() == [0.0, 0.0]
    assert slopes.isnan().tolist() == [[False, False, True, True, False, False]]


def check_hashed(x: torch.Tensor, bits: int, dim: int) -> None:
    num_lookups = x.shape[1] // bits
    table = torch.randn(num_lookups << bits, dim).to(x.dtype)
    codes, scores = oracles.sign_hash(x.double().numpy(), bits, "released", 0.7)
    expected = oracles.gather_sum(table.double().numpy(), codes, scores, 1 << bits)
    check(hashed.hashed_gather_sum(table, x, bits, "released", 0.7, "t"), expected)


def check_normed(x: torch.Tensor, bits: int, dim: int, *, is_centred: bool) -> None:
    num_lookups, dtype = x.shape[1] // bits, x.dtype
    table, weight = torch.randn(num_lookups << bits, dim).to(dtype), torch.randn(x.shape[1]).to(dtype)
    shift = torch.randn(x.shape[1]).to(dtype) if is_centred else None
    bias, residual = torch.randn(dim).to(dtype), torch.randn(len(x), dim).to(dtype)
    parts = (None if each is None else each.double().numpy() for each in (weight, shift))
    z = oracles.norm(x.double().numpy(), is_centred, 1e-5, *parts)
    z = torch.from_numpy(z).to(dtype).double().numpy()  # what is hashed is rounded
    expected = oracles.gather_sum(table.double().numpy(), *oracles.sign_hash(z, bits, "paper", 1.0), 1 << bits)
    norm = Norm(is_centred, 1e-5, weight, shift)
    got = hashed.hashed_gather_sum(table, x, bits, "paper", 1.0, "t", norm=norm, bias=bias, residual=residual)
    check(got, expected + bias.double().numpy() + residual.double().numpy())


def attending() -> None:
    for length, head_dim, half, dtype in (
        (0, 8, 2, torch.float32),
        (5, 8, 0, torch.float32),
        (17, 40, 20, torch.bfloat16),
        (40, 1, 0, torch.float16),
    ):
        check_attention(make_attention(3, 2, length, head_dim, half, dtype, has_residual=length == 5))
    attention._TILE, attention._LEAST_TOKENS = 64, 16  # as for long sequences
    for length in (15, 16, 17, 40):
        for has_residual in (False, True):
            check_attention(make_attention(2, 1, length, 20, 5, torch.float32, has_residual=has_residual))
    attention._MOST_PROGRAMS = 2
    assert attention.part_tokens(1, 100, 4) == 64
    check_attention(make_attention(1, 1, 99, 4, 2, torch.float32, has_residual=True))


def check_attention(made: Attention) -> None:
    expected, length = expected_attention(made), made.length
    check(attention.one_token_attention(*made), expected.out)
    check(made.keys[:, :, : length + 1], expected.keys)
    check(made.values[:, :, : length + 1], expected.values)
    assert made.keys[:, :, length + 1 :].isnan().all() and made.values[:, :, length + 1 :].isnan().all()


def bad_ids() -> None:
    """A bad id poisons what it would have fed, touches nothing else, and is told of at the next call."""
    table = torch.randn(12, 8)
    for num_tokens in (2, 40):  # either kernel
        for bad in (12, -1):
            ids = torch.zeros(num_tokens, 2, dtype=torch.int64)
            ids[1, 1] = bad
            scores = torch.ones(num_tokens, 2)
            out = sums.gather_sum(table, ids, scores, 0, "layers.3.ffn2")
            assert out.isnan().all(dim=1).tolist() == [n == 1 for n in range(num_tokens)]
            expect_error(f'row id {bad} is outside table "layers.3.ffn2" (num_rows=12)')
            grads = gradients.row_gradient(table, ids, scores, torch.ones(num_tokens, 8), 0, "other")
            assert grads[0][0].tolist() == [2.0 * num_tokens - 1] * 8
            assert grads[0][1:].count_nonzero() == 0
            assert grads[1].isnan().nonzero().tolist() == [[1, 1]]
            try:
                sums.gather_sum(table, ids.clamp(0, 11), scores, 0, "layers.3.ffn2")
            except RowIdError as error:
                assert str(error).startswith(f'row id {bad} is outside table "other"')
            else:
                raise AssertionError("the next call must raise")
            codes = ids.int().clamp(max=6)
            grads = gradients.row_gradient(table, codes, scores, torch.ones(num_tokens, 8), 6, "codes")
            assert grads[0][:, 0].nonzero().flatten().tolist() == [0, 6]
            assert grads[0][[0, 6], 0].tolist() == [num_tokens, num_tokens - 1.0]
            assert grads[1].isnan().nonzero().tolist() == [[1, 1]]
            expect_error(f'code {codes[1, 1]} is outside its part of table "codes"')
            # A part of the table without columns has nothing to sum, and tells of the id all the same.
            assert sums.gather_sum(table[:, :0], ids, scores, 0, "narrow").shape == (num_tokens, 0)
            expect_error(f'row id {bad} is outside table "narrow" (num_rows=12)')
    # Of pieces one ends where the order has a gap, within it and at its end; once as they lie, once by token.
    pieces._LENGTH, pieces._LENGTH_BY_TOKEN, pieces._GROUP, slicing._CACHED_BYTES = 8, 8, 8, 1
    for k, slicing._LONG_RUN in ((0, 10**9), (1, 10**9), (0, 1), (1, 1)):
        codes = torch.zeros(40, 2, dtype=torch.int32)
        codes[1, k] = 6
        grads = gradients.row_gradient(table, codes, torch.ones(40, 2), torch.ones(40, 8), 6, "codes")
        assert grads[0][:, 0].nonzero().flatten().tolist() == [0, 6]
        assert grads[0][[0, 6], 0].tolist() == [40.0 - (k == 0), 40.0 - (k == 1)]
        assert grads[1].isnan().nonzero().tolist() == [[1, k]]
        expect_error('code 6 is outside its part of table "codes"')
    codes = torch.tensor([[3, 6]], dtype=torch.uint16)
    sums.gather_sum(table[:, :0], codes, torch.ones(1, 2), 6, "narrow")
    expect_error('code 6 is outside its part of table "narrow"')
    check_errors()


def expect_error(start: str) -> None:
    try:
        check_errors()
    except RowIdError as error:
        assert str(error).startswith(start), error
    else:
        raise AssertionError("check_errors must raise")


if __name__ == "__main__":
    torch.manual_seed(0)
    sums.FEW_TOKENS = hashed.FEW_TOKENS = 32  # shapes here are small, and all kernels are to be met
    sums._MANY_SUMS = 0
    parts = (lookups, by_token, sorting, ragged_lookups, quantised, hashing, attending, bad_ids)
    {part.__name__: part for part in parts}[sys.argv[1]]()

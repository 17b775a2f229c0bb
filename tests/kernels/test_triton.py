"""The Triton kernels where there is no GPU: run in Triton's interpreter, and compiled for two generations of GPU."""

import re
from typing import Any

import pytest
import torch

from mfdist.errors import ConfigError
from mfdist.kernels import gather_sum, implementation, row_gradient, sign_hash
from mfdist.kernels.row_gradient.triton_order import place_dtype
from mfdist.kernels.row_gradient.triton_slices import is_seldom, slices, widest
from mfdist.kernels.row_id_check import can_be_bad
from mfdist.kernels.triton_launch import LAUNCH_OPTIONS, next_power_of_2
from mfdist.sharding.workload import reads_most_rows
from tests.kernels.conftest import Interpret
from tests.kernels.lookups import assert_is, expected_gradients, expected_sum, make_lookup

INTERPRETED = "interpreted_triton"


@pytest.mark.parametrize(
    "part", ["lookups", "by_token", "sorting", "ragged_lookups", "quantised", "hashing", "attending", "bad_ids"]
)
def test_in_the_interpreter(part: str, interpret: Interpret) -> None:
    done = interpret(INTERPRETED, part)
    assert done.returncode == 0, done.stderr


SIZES = {"N": "i32", "K": "i32", "D": "i32", "S": "i32", "limit": "i32"}
LOOKUP = {"table": "*bf16", "row_ids": "*u8", "scores": "*fp32", "out": "*bf16", "error_word": "*i64", **SIZES}
INT8 = {**LOOKUP, "table": "*i8", "scales": "*fp32"}
FP8 = {**INT8, "table": "*u8"}
GRADIENT = {"grad_output": "*bf16", "grad_table": "*bf16", "grad_scores": "*fp32", **LOOKUP}
ORDER = {
    "words": "*i64",
    "turned": "*fp32",
    "starts": "*i32",
    "ends": "*i32",
    "pieces": "*fp32",
    "CHUNKS": "i32",
    "num_ids": "i64",
    "R": "i64",
}
COUNTING = {**GRADIENT, **ORDER, "codes": "*i16", "counts": "*i32"}
SORTING = {**ORDER, "sorted_words": "*i64", "counts": "*i32", "M": "i64", "BIT": "i32"}
SUMS = {"first_column": "i32", **GRADIENT, **ORDER}
WAYS = {"IS_WHOLE": True, "OFFSET": "int32"}
SLICE = {"K": 48, "PIECE": 1024, "COLUMNS": 512, "IS_ADDED": True, "HAS_PRODUCTS": True}
STATES = {"first": "*bf16", "second": "*bf16", "shared": "*fp32", "keys": "*i64", "row_offset": "i64", "rows": "*i32"}
UPDATE = {
    **SUMS,
    **STATES,
    "M": "i64",
    "grads": "*bf16",
    "mean_squares": "*fp32",
    "products": "*fp32",
    "squares": "*fp32",
    "sums": "*fp32",
    "num_kept": "i32",
    "column_offset": "i32",
}
ADAGRAD = {**UPDATE, "first": "*fp32"}
MOMENTS = {**UPDATE, "first": "*u8", "second": "*u8"}
WHOLE = {
    "K": 128,
    "PIECE": 512,
    "COLUMNS": 1024,
    "IS_ADDED": False,
    "HAS_PRODUCTS": True,
    "IS_UPDATED": True,
    "SQUARES": 0,
}
IN_SLICES = {**WHOLE, "COLUMNS": 512, "IS_ADDED": True}
STEP = dict.fromkeys(
    ("weight_decay", "eps", "beta1", "complement1", "log_beta1", "beta2", "complement2", "log_beta2"), "fp32"
)
PACKED = {**LOOKUP, "packed": "*i64"}
PACK = {"TOKENS": 64, "LOOKUPS": 32, "IS_CHECKED": True}
SLICE_TILE = {"TOKENS": 32, "COLUMNS": 64, "UNROLLED": 2, "OFFSET": "int32", "IS_WHOLE": True}
STREAM = {"TOKENS": 1, "COLUMNS": 1024, "UNROLLED": 4, "OFFSET": "int64", "IS_CHECKED": False}
FEW = {"LOOKUPS": 64, "COLUMNS": 32, "IS_CHECKED": True, "IS_CHAINED": False}
RAGGED = {
    **GRADIENT,
    "row_ids": "*i32",
    "tokens": "*i32",
    "order": "*i64",
    "ends": "*i64",
    "runs": "*i64",
    "pieces": "*fp32",
    "grad_rows": "*bf16",
}
HASHED = {
    **LOOKUP,
    **dict.fromkeys(("x", "weight", "shift", "bias", "residual"), "*bf16"),
    "slope": "fp32",
    "eps": "fp32",
}
HASH = {
    "BITS": 10,
    "WIDTH": 16,
    "IS_RELEASED": True,
    "LOOKUPS": 64,
    "COLUMNS": 32,
    "IS_ONE_ROUND": True,
    "HAS_NORM": True,
    "IS_CENTRED": False,
    "SECTORS": 128,
    "IS_CHAINED": False,
}
ATTENTION = {
    **dict.fromkeys(("qkv", "keys", "values", "residual", "out"), "*bf16"),
    **dict.fromkeys(("cosine", "sine", "sums"), "*fp32"),
    **dict.fromkeys(("length", "part", "capacity", "E", "F", "step", "num_parts"), "i32"),
    "slope": "fp32",
}
ATTEND = {"WIDTH": 128, "TOKENS": 64, "SECTORS": 512, "IS_WHOLE": True, "IS_CHAINED": False}
KERNELS = {
    "gather_sum.triton_impl._pack": (PACKED, {**PACK, "scales": None}),
    "gather_sum.triton_impl._pack of fp8": ({**PACKED, **FP8}, PACK),
    "gather_sum.triton_impl._sum_slice": (PACKED, SLICE_TILE),
    "gather_sum.triton_impl._sum_slice of int8": ({**PACKED, **INT8}, SLICE_TILE),
    "gather_sum.triton_impl._sum_slice of fp8": ({**PACKED, **FP8}, {**SLICE_TILE, "IS_WHOLE": False}),
    "gather_sum.triton_impl._stream_rows": (LOOKUP, {**STREAM, "scales": None}),
    "gather_sum.triton_impl._sum_few": (LOOKUP, {**FEW, "scales": None}),
    "gather_sum.triton_impl._stream_rows of int8": (INT8, STREAM),
    "gather_sum.triton_impl._stream_rows of fp8": (FP8, STREAM),
    "gather_sum.triton_impl._sum_few of fp8": (FP8, FEW),
    "row_gradient.triton_order._make_keys": (
        {**GRADIENT, "row_ids": "*i64", "keys": "*i64", "R": "i64", "LOOKUP_BITS": "i32"},
        {"TOKENS": 128, "LOOKUPS": 32, "IS_CHECKED": True, "IS_TURNED": False},
    ),
    "row_gradient.triton_order._turn": (
        {**COUNTING, "row_ids": "*u16"},
        {"TOKENS": 128, "LOOKUPS": 32, "IS_CHECKED": True},
    ),
    "row_gradient.triton_order._count": (COUNTING, {"CHUNK": 1024, "BINS": 256}),
    "row_gradient.triton_order._bound": (COUNTING, {"CHUNKS_UP": 16, "CODES": 256}),
    "row_gradient.triton_order._place": (COUNTING, {"CHUNK": 1024, "TOKENS": 32}),
    "ragged_gradient.triton_impl._sum_piece": (RAGGED, {"ENTRIES": 4, "COLUMNS": 512, "PIECE": 256}),
    "ragged_gradient.triton_impl._sum_row": (RAGGED, {"ENTRIES": 4, "COLUMNS": 512, "PIECE": 256}),
    "ragged_gradient.triton_impl._multiply": (RAGGED, {"COLUMNS": 512}),
    "row_gradient.triton_pieces._order_windows": (
        {**SUMS, "windows": "*i32", "num_windows": "i32", "SHIFT": "i32"},
        {"LENGTH": 64, "GROUP": 2048},
    ),
    "row_gradient.triton_pieces.sum_piece": (SUMS, {**SLICE, **WAYS, "windows": None}),
    "row_gradient.triton_pieces.sum_piece of a list": (
        {**SUMS, "row_ids": "*i32"},
        {**SLICE, **WAYS, "windows": None, "S": None},
    ),
    "row_gradient.triton_pieces.sum_piece by token": ({**SUMS, "windows": "*i32"}, {**SLICE, **WAYS}),
    "row_gradient.triton_impl._sum_row": (SUMS, {**SLICE, **WAYS, "IS_ADDED": False}),
    "row_gradient.triton_impl._sum_row of whole rows": (SUMS, {**SLICE, **WAYS, "COLUMNS": 1024}),
    "row_gradient.triton_impl._sum_row of narrow slices": (
        SUMS,
        {**SLICE, "COLUMNS": 128, "IS_WHOLE": False, "OFFSET": "int64"},
    ),
    "row_gradient.triton_order._split_keys": (
        {**SUMS, "keys": "*i64", "rows": "*i32", "LOOKUP_BITS": "i32"},
        {"IDS": 1024, "numbers": None},
    ),
    "row_gradient.triton_order._split_keys of a list": (
        {**SUMS, "keys": "*i64", "rows": "*i32", "LOOKUP_BITS": "i32", "numbers": "*i64"},
        {"IDS": 1024},
    ),
    "row_gradient.triton_sort._count": (SORTING, {"CHUNK": 1024, "BINS": 128}),
    "row_gradient.triton_sort._place": (SORTING, {"CHUNK": 1024, "BINS": 256, "TOGETHER": 32}),
    "row_update.triton_rule._prepare": (
        {"lr": "*fp32", "step": "*i64", "shared": "*fp32", "keys": "*i64", "seed": "i64", **STEP},
        {},
    ),
    "row_update.triton_impl._update_row by adagrad": (ADAGRAD, {**WHOLE, **WAYS, "RULE": 1, "IS_KEPT": False}),
    "row_update.triton_impl._update_row by adagrad in slices": (
        ADAGRAD,
        {**IN_SLICES, **WAYS, "RULE": 1, "SQUARES": 3, "IS_KEPT": True},
    ),
    "row_update.triton_impl._update_row by adam": (UPDATE, {**WHOLE, **WAYS, "RULE": 2, "IS_KEPT": False}),
    "row_update.triton_impl._update_row by adam with bytes": (
        MOMENTS,
        {**WHOLE, **WAYS, "RULE": 2, "IS_KEPT": False},
    ),
    "row_update.triton_windows._update_window by adam with bytes": (
        MOMENTS,
        {**WHOLE, "RULE": 2, "IS_LAST_PRODUCT": True, "IS_WHOLE": True, "WINDOW": 32},
    ),
    "row_update.triton_impl._update_kept": (ADAGRAD, {"COLUMNS": 512, "RULE": 1}),
    "row_update.triton_windows._update_window by adagrad": (
        ADAGRAD,
        {**WHOLE, "RULE": 1, "IS_LAST_PRODUCT": True, "IS_WHOLE": True, "WINDOW": 32},
    ),
    "row_update.triton_windows._update_window by sgd in slices": (
        UPDATE,
        {**IN_SLICES, "RULE": 0, "IS_LAST_PRODUCT": False, "IS_WHOLE": False, "WINDOW": 32},
    ),
    "row_update.triton_windows._update_long_run": (UPDATE, {**IN_SLICES, "RULE": 2}),
    "row_update.triton_windows._sum_long_piece": ({**UPDATE, "rows": "*i64"}, SLICE),
    "row_update.triton_impl._update_given": (
        UPDATE,
        {"COLUMNS": 1024, "RULE": 2, "HAS_ROWS": True, "IS_DENSE": False, "HAS_SQUARES": True},
    ),
    "row_update.triton_impl._update_given by adagrad": (
        ADAGRAD,
        {"COLUMNS": 2048, "RULE": 1, "HAS_ROWS": True, "IS_DENSE": False, "HAS_SQUARES": True},
    ),
    "sign_hash.triton_impl._hash": (
        {"x": "*bf16", "codes": "*u16", "scores": "*fp32", "num_chunks": "i32", "slope": "fp32"},
        {"BITS": 10, "WIDTH": 16, "CHUNKS": 128, "IS_RELEASED": True},
    ),
    "hashed_gather_sum.triton_impl._sum_hashed": (
        HASHED,
        {**HASH, "IS_ONE_ROUND": False, "HAS_NORM": False, **dict.fromkeys(("weight", "shift", "bias", "residual"))},
    ),
    "hashed_gather_sum.triton_impl._sum_hashed after RMSNorm": (HASHED, {**HASH, "shift": None}),
    "hashed_gather_sum.triton_impl._sum_hashed after LayerNorm": (HASHED, {**HASH, "IS_CENTRED": True}),
    "hashed_gather_sum.triton_norm._normalise": (
        {**HASHED, "size": "i32"},
        {"IS_CENTRED": True, "BLOCK": 4096, "SECTORS": 256, "IS_CHAINED": False},
    ),
    "one_token_attention.triton_impl._attend": (ATTENTION, ATTEND),
    "one_token_attention.triton_impl._attend to a part": (
        {**ATTENTION, "out": "*fp32"},
        {**ATTEND, "residual": None, "IS_WHOLE": False},
    ),
    "one_token_attention.triton_impl._merge": (ATTENTION, {"WIDTH": 128, "PARTS": 16, "IS_CHAINED": False}),
    "sign_hash.triton_impl._gradient": (
        {"x": "*bf16", "grad_scores": "*fp32", "grad_x": "*bf16", "num_chunks": "i32", "slope": "fp32"},
        {"BITS": 10, "WIDTH": 16, "CHUNKS": 64, "IS_RELEASED": False},
    ),
}


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}


def compile_for(name: str, target: str, **changed: object) -> Any:
    """Return one of KERNELS, some of its constants changed, compiled for one of TARGETS."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel_name = name.split(" ")[0].rsplit(".", 1)
    kernel = getattr(import_module(f"mfdist.kernels.{module}"), kernel_name)
    types, constants = KERNELS[name]
    constants = {**constants, **changed}
    constants = {
        arg: getattr(triton.language, value) if isinstance(value, str) else value for arg, value in constants.items()
    }
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(LAUNCH_OPTIONS))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiling_for_a_gpu(name: str, target: str) -> None:
    compiled = compile_for(name, target)
    if TARGETS[target][0] == "hip":
        assert compiled.asm["hsaco"]
        return
    assert compiled.asm["cubin"]
    # The order of atomic additions differs from run to run, which only whole numbers do not show.
    atomics = re.findall(r"^\s*(?:@\S+ )?((?:atom|red)\..*?)\s", compiled.asm["ptx"], re.MULTILINE)
    assert all(atomic.endswith(".shared.add.u32") for atomic in atomics), atomics


@pytest.mark.parametrize(
    "name",
    [
        "gather_sum.triton_impl._sum_few of fp8",
        "hashed_gather_sum.triton_impl._sum_hashed",
        "hashed_gather_sum.triton_impl._sum_hashed after LayerNorm",
        "hashed_gather_sum.triton_norm._normalise",
        "one_token_attention.triton_impl._attend",
        "one_token_attention.triton_impl._merge",
    ],
)
def test_a_kernel_that_starts_early_waits_before_it_reads(name: str) -> None:
    text = compile_for(name, "sm_90", IS_CHAINED=True).asm["ptx"]
    wait, start = text.index("griddepcontrol.wait"), text.index("griddepcontrol.launch_dependents")
    accesses = [found.start() for found in re.finditer(r"\b(?:ld|st)\.global", text)]
    assert wait < min(*accesses, start) and start < max(accesses)
    assert "griddepcontrol" not in compile_for(name, "sm_90").asm["ptx"]


def test_warps_of_a_row_read_its_state_before_one_of_them_writes_it() -> None:
    text = compile_for("row_update.triton_impl._update_given by adagrad", "sm_90").asm["ptx"]
    written = re.search(r"st\.global\.b32\s+\[ (%rd\d+)", text)
    assert written is not None
    read = text.index(f"[ {written[1]} + 0 ]")
    assert "ld.global.b32" in text[read - 40 : read]
    assert read < text.index("bar.sync") < written.start()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_two_bf16_values_are_unpacked_by_two_instructions(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("mfdist.kernels.triton_rows._IS_PTX", triton.language.constexpr(True))
    # Constants that no other test has: what was compiled for those is kept.
    text = compile_for("gather_sum.triton_impl._sum_slice", target, TOKENS=16).asm["ptx"]
    assert len(re.findall(r"shl\.b32 %r\d+, %r\d+, 16; and\.b32 %r\d+, %r\d+, 0xffff0000;", text)) > 0
    assert "cvt.f32.bf16" not in text


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        "gather_sum.triton_impl._stream_rows",
        "gather_sum.triton_impl._stream_rows of int8",
        "ragged_gradient.triton_impl._multiply",
        "ragged_gradient.triton_impl._sum_row",
        "row_gradient.triton_impl._sum_row of narrow slices",
        "row_update.triton_impl._update_row by adagrad",
        "row_update.triton_windows._update_window by adagrad",
    ],
)
def test_rows_narrower_than_what_is_unpacked_together(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("mfdist.kernels.triton_rows._IS_PTX", triton.language.constexpr(True))
    changed = {"ENTRIES": 1} if name.startswith("ragged_gradient.triton_impl._sum") else {}
    assert compile_for(name, "sm_90", COLUMNS=columns, **changed).asm["cubin"]


def test_a_gpu_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    implementation.on_gpu.cache_clear()
    with pytest.raises(ConfigError, match="pip install triton"):
        implementation.on_gpu("gather_sum")


def test_sizes_of_tiles() -> None:
    assert [next_power_of_2(size) for size in (1, 2, 3, 100, 1024)] == [1, 2, 4, 128, 1024]
    codes = torch.zeros(1, dtype=torch.uint8)
    assert [can_be_bad(codes, limit) for limit in (16, 255, 256)] == [True, True, False]
    assert [can_be_bad(codes.to(torch.uint16), limit) for limit in (65_535, 65_536)] == [True, False]
    assert can_be_bad(codes.int(), 1 << 20)
    assert [place_dtype(1 << bits) for bits in (30, 31)] == [torch.int32, torch.int64]
    assert place_dtype((1 << 31) - 3 * 512) == torch.int64  # places past the last, which are computed too, fit
    widths = {1: [1], 40: [64], 160: [256], 640: [128, 512], 960: [1024], 1280: [256, 1024], 1536: [512, 1024]}
    widths |= {520: [512, 8], 700: [512, 256], 1792: [256, 512, 1024]}
    for dim, expected in widths.items():
        found = slices(dim, 1024)
        assert [part.columns for part in found] == expected
        assert [part.first for part in found] == [sum(expected[:index]) for index in range(len(expected))]
    assert [part.columns for part in slices(12288, 512)] == [512] * 24
    assert [part.columns for part in slices(1536, 512)] == [512] * 3
    assert [part.columns for part in slices(768, 256)] == [256] * 3


def test_lookups_are_put_in_order_ahead_where_all_rows_are_summed() -> None:
    for num_lookups in (0, 399, 400, 401, 4000):
        assert is_seldom(num_lookups, 100) is not reads_most_rows(num_lookups, 100)


def test_widths_of_slices() -> None:
    def most(num_tokens: int, dim: int, mean_run: int, dtype: torch.dtype = torch.float32, **options: bool) -> int:
        grads, num_ids = torch.empty(num_tokens, dim, device="meta", dtype=dtype), 512 * num_tokens
        return widest(grads, num_ids, num_ids // mean_run, **options)

    for dim, columns in {40: 512, 960: 512, 1024: 1024, 1280: 512, 1536: 512, 3072: 1024}.items():
        assert (most(64, dim, 32), most(64, dim, 31)) == (columns, 512)
        assert most(64, dim, 31, torch.bfloat16) == columns
    # Of many tokens, what the second-level cache holds, and no less than 256 columns.
    for num_tokens, columns in {16384: 1024, 16385: 512, 32768: 512, 50_000: 256, 65536: 256, 1 << 20: 256}.items():
        assert most(num_tokens, 3072, 64) == columns
        assert most(num_tokens, 3072, 64, needs_squares=True) == 1024
    assert most(32768, 3072, 64, torch.bfloat16) == 1024
    # Where pieces go by token, as many bytes as pay.
    assert [most(65536, 3072, run, torch.bfloat16) for run in (128, 256)] == [512, 512]
    assert [most(131_072, 3072, run, torch.bfloat16) for run in (128, 256)] == [256, 512]
    assert [most(131_072, 3072, run) for run in (128, 256)] == [256, 256]
    assert most(131_072, 3072, 256, torch.bfloat16, needs_squares=True) == 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_compact", [True, False], ids=["codes", "ids"])
def test_on_a_gpu(is_compact: bool, dtype: torch.dtype) -> None:
    lookup = make_lookup(100, 5, 64, 300, dtype=dtype, id_dtype=torch.int32, is_compact=is_compact)
    table, ids, scores = lookup.table.cuda(), lookup.row_ids.cuda(), lookup.scores.cuda()
    assert_is(gather_sum(table, ids, scores, lookup.code_stride), expected_sum(lookup), dtype)
    got = row_gradient(table, ids, scores, lookup.grad_output.cuda(), lookup.code_stride)
    expected = expected_gradients(lookup)
    assert_is(got[0], expected[0], dtype)
    assert_is(got[1], expected[1], torch.float32)
    x = torch.randn(100, 64)
    for one, two in zip(sign_hash(x.cuda(), 8), sign_hash(x, 8), strict=True):
        assert torch.allclose(one.cpu().float(), two.float(), rtol=1e-5)

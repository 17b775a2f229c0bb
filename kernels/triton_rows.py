"""Rows inside Triton kernels: their values as fp32, and what those are multiplied by."""

import torch
import triton
import triton.language as tl

#: Whether kernels can hold NVIDIA's instructions.
_IS_PTX = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)
_E4M3_FACTOR = tl.constexpr(256.0)  # its exponent counts from 7 where fp16's counts from 15


@triton.jit
def as_fp32(values):
    """Return a block of row values as fp32: fp32, fp16, bf16 and int8 as they are, uint8 as e4m3 / 256.

    The bits of an e4m3 value, put where fp16 has its own, are the value but for that power of two, subnormal ones
    included. So rows in fp8 need no processor that knows fp8.
    """
    if values.dtype == tl.int8 and _IS_PTX and values.numel % 4 == 0:
        return int8_as_fp32(values)
    if values.dtype == tl.int8:
        # Operations at the processor's full rate, where a conversion has an eighth of it: the value + 128 becomes the
        # low bits of a float near 2²³.
        bits = (values.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int32) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    if values.dtype == tl.bfloat16 and _IS_PTX and values.numel % 2 == 0:
        return bf16_as_fp32(values)
    if values.dtype == tl.uint8:
        bits = values.to(tl.int8, bitcast=True).to(tl.int16) << 7
        return (bits & -0x4001).to(tl.float16, bitcast=True).to(tl.float32)
    return values.to(tl.float32)


@triton.jit
def bf16_as_fp32(values):
    """Return bf16 values as fp32 by one instruction each on NVIDIA's GPUs, whose compiler takes two for every other."""
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [values], tl.float32, is_pure=True, pack=2
    )


@triton.jit
def int8_as_fp32(values):
    """Return int8 values as fp32 by the same operations, for four in a word: the compiler takes half as many again."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 words, a, b, c, d;
        xor.b32 words, $4, 0x80808080;
        prmt.b32 a, words, 0x4B000000, 0x7440;
        prmt.b32 b, words, 0x4B000000, 0x7441;
        prmt.b32 c, words, 0x4B000000, 0x7442;
        prmt.b32 d, words, 0x4B000000, 0x7443;
        mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c; mov.b32 $3, d;
        add.f32 $0, $0, 0fCB000080;
        add.f32 $1, $1, 0fCB000080;
        add.f32 $2, $2, 0fCB000080;
        add.f32 $3, $3, 0fCB000080;
        }""",
        "=f,=f,=f,=f,r",
        [values],
        tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def weighted(score, table, scales, rows, is_read):
    """Return what `as_fp32` of a row is multiplied by: the lookup's score, and the row's scale where there is one.

    Args:
        score: a block of fp32.
        table: pointer to the rows; its type alone is looked at.
        scales: pointer to the scale of each row, or None where rows have none.
        rows: which row each score is for, counted from `scales`.
        is_read: which of them lie in the table.
    """
    if scales is not None:
        score *= tl.load(scales + rows, mask=is_read, other=0.0)
        if table.dtype.element_ty == tl.uint8:
            score *= _E4M3_FACTOR
    return score

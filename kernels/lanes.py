"""Explicit vectors for the numba kernels: a run of neighbouring fp32 values that lives in registers.

LLVM vectorises none of the lookup loops by itself (every row may alias every other), so the kernels say what they mean:
`load` a run of a row, `scaled_add` it to an accumulator, `store` it. A run's width is part of its type and LLVM splits
it into whatever registers the processor has, so one kernel serves AVX-512, AVX2 and NEON.

Rows arrive as flat numpy arrays whose dtype says how to read them: float32 and int8 as they are, uint16 as bf16, int16
as fp16, uint8 as e4m3 divided by `E4M3_FACTOR`.
"""

import sys
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_HALF_BITS = 16
_LINE_BYTES = 64  # of a cache
#: What `load` leaves out of an e4m3 value, whose exponent counts from 7 where fp16's counts from 15.
E4M3_FACTOR = 256.0


class Lanes(types.Type):
    """Type of a run of `width` fp32 values."""

    def __init__(self, width: int) -> None:
        """Name the type by its width; numba compares types by name."""
        super().__init__(name=f"Lanes({width})")
        self.width = width


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, vector_of(ir.FloatType(), lanes.width))


def _zeros_of(width: int) -> Callable[[], Any]:
    @intrinsic
    def zeros(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(vector_of(ir.FloatType(), width), [0.0] * width)

        return Lanes(width)(), generate

    made: Callable[[], Any] = zeros
    return made


_HAS_AVX512 = binding.get_host_cpu_features().get("avx512f", False)
#: A tile of columns: half of the registers, of AVX-512 or of AVX2, for the fewest passes over the rows.
WIDE = 256 if _HAS_AVX512 else 64
#: Half of it, where there are so many.
HALF = 128 if _HAS_AVX512 else 64
#: A tile for kernels that hold two of them and add the values of one up.
MIDDLE = 64
#: The smallest tile but what is left of a row, for widths such as 160.
NARROW = 32
#: What is left of a row, for widths such as 1000; then come single columns.
FEW = 8

zeros_wide = _zeros_of(WIDE)
zeros_half = _zeros_of(HALF)
zeros_middle = _zeros_of(MIDDLE)
zeros_narrow = _zeros_of(NARROW)
zeros_few = _zeros_of(FEW)
zeros_single = _zeros_of(1)


@intrinsic
def width(typing_context: Any, lanes: Any) -> Any:
    """Return the number of values in a run."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, signature.args[0].width)

    return types.intp(lanes), generate


@intrinsic
def load(typing_context: Any, array: Any, index: Any, like: Any) -> Any:
    """Return the run of `like`'s width that starts at `array[index]`, as fp32."""
    return like(array, types.intp, like), generate_load


def generate_load(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Generate `load`."""
    array_type, _, lanes = signature.args
    element = element_of(array_type)
    value = builder.load(address_of(context, builder, array_type, args, element, lanes.width))
    value.align = element.width // 8 if isinstance(element, ir.IntType) else array_type.dtype.bitwidth // 8
    if array_type.dtype == types.uint16:
        words = vector_of(ir.IntType(32), lanes.width)
        value = builder.shl(builder.zext(value, words), ir.Constant(words, [_HALF_BITS] * lanes.width))
        return builder.bitcast(value, vector_of(ir.FloatType(), lanes.width))
    if array_type.dtype == types.uint8:
        value = _half_of_e4m3(builder, value, lanes.width)
    if array_type.dtype in (types.int16, types.uint8):
        return builder.fpext(value, vector_of(ir.FloatType(), lanes.width))
    if array_type.dtype == types.int8:
        return builder.sitofp(value, vector_of(ir.FloatType(), lanes.width))
    return value


@intrinsic
def load_mixed(typing_context: Any, array: Any, index: Any, like: Any) -> Any:
    """Return what `load` returns, in the order that takes the fewest operations; `unmixed` brings it back.

    Of bf16, the upper halves of 32-bit words are values as they are, and the lower ones after one shift: so all even
    values come first, then all odd ones.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type, _, lanes = signature.args
        if not _is_mixed(array_type, lanes):
            return generate_load(context, builder, signature, args)
        half = lanes.width // 2
        words = vector_of(ir.IntType(32), half)
        pairs = builder.load(address_of(context, builder, array_type, args, ir.IntType(32), half))
        pairs.align = array_type.dtype.bitwidth // 8
        even = builder.shl(pairs, ir.Constant(words, [_HALF_BITS] * half))
        odd = builder.and_(pairs, ir.Constant(words, [0xFFFF0000] * half))
        order = ir.Constant(vector_of(ir.IntType(32), lanes.width), list(range(lanes.width)))
        return builder.bitcast(builder.shuffle_vector(even, odd, order), vector_of(ir.FloatType(), lanes.width))

    return like(array, types.intp, like), generate


@intrinsic
def unmixed(typing_context: Any, run: Any, array: Any) -> Any:
    """Return a run made of what `load_mixed` returned for `array`, in the order of the columns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, array_type = signature.args
        if not _is_mixed(array_type, lanes):
            return args[0]
        return _shuffle(builder, args[0], [i // 2 + i % 2 * (lanes.width // 2) for i in range(lanes.width)])

    return run(run, array), generate


def _is_mixed(array_type: Any, lanes: Any) -> bool:
    return bool(array_type.dtype == types.uint16 and lanes.width % 2 == 0 and sys.byteorder == "little")


@intrinsic
def at(typing_context: Any, array: Any, index: Any) -> Any:
    """Return `array[index]`, without numba's test for an index that counts from the end."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a run at `array[index]`, rounded to the nearest even value of the array's format."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type, _, lanes = signature.args
        element = element_of(array_type)
        run = args[2]
        if array_type.dtype == types.uint16:
            run = _round_to_bf16(builder, run, lanes.width)
        elif array_type.dtype == types.int16:
            run = builder.fptrunc(run, vector_of(ir.HalfType(), lanes.width))
        written = builder.store(run, address_of(context, builder, array_type, args, element, lanes.width))
        written.align = array_type.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def copy(typing_context: Any, to: Any, to_index: Any, array: Any, index: Any, like: Any) -> Any:
    """Write the run of `like`'s width that starts at `array[index]` at `to[to_index]`, as it is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to_type, _, array_type, _, lanes = signature.args
        element = element_of(array_type)
        alignment = array_type.dtype.bitwidth // 8
        value = builder.load(address_of(context, builder, array_type, args[2:], element, lanes.width))
        value.align = alignment
        written = builder.store(value, address_of(context, builder, to_type, args, element, lanes.width))
        written.align = alignment
        return context.get_dummy_value()

    return types.void(to, types.intp, array, types.intp, like), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any, like: Any) -> Any:
    """Start to fetch the run of `like`'s width that starts at `array[index]` into the second-level cache.

    Not the first: rows as long as a power of two share few places of it, and drive each other out before their use.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type, _, lanes = signature.args
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        start = builder.bitcast(address_of(context, builder, array_type, args, ir.IntType(8), 1), byte)
        reading, keeping, data = (ir.Constant(word, flag) for flag in (0, 2, 1))
        for offset in range(0, lanes.width * array_type.dtype.bitwidth // 8, _LINE_BYTES):
            line = builder.gep(start, [ir.Constant(ir.IntType(64), offset)])
            builder.call(function, [line, reading, keeping, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, like), generate


@intrinsic
def scaled_add(typing_context: Any, run: Any, scale: Any, to: Any) -> Any:
    """Return run · scale + to, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fused(builder, args[0], splat(builder, args[1], signature.args[0].width), args[2])

    return run(run, types.float32, to), generate


@intrinsic
def product_add(typing_context: Any, left: Any, right: Any, to: Any) -> Any:
    """Return left · right + to, value by value, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fused(builder, *args)

    return left(left, right, to), generate


@intrinsic
def scaled(typing_context: Any, run: Any, scale: Any) -> Any:
    """Return run · scale."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], splat(builder, args[1], signature.args[0].width))

    return run(run, types.float32), generate


@intrinsic
def over_root(typing_context: Any, run: Any, square: Any, least: Any) -> Any:
    """Return run / (√square + least), value by value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, kind = signature.args[0].width, args[1].type
        name = f"llvm.sqrt.v{lanes}f32"
        root = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
        divisor = builder.fadd(builder.call(root, [args[1]]), splat(builder, args[2], lanes))
        return builder.fdiv(args[0], divisor)

    return run(run, square, types.float32), generate


@intrinsic
def total(typing_context: Any, run: Any) -> Any:
    """Return the sum of a run's values, halves added to halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, count = args[0], signature.args[0].width
        while count > 1:
            count //= 2
            low = _shuffle(builder, value, range(count))
            value = builder.fadd(low, _shuffle(builder, value, range(count, 2 * count)))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(run), generate


def vector_of(element: Any, width: int) -> Any:
    """Return LLVM's type of `width` elements."""
    return ir.VectorType(element, width)


def element_of(array_type: Any) -> Any:
    """Return LLVM's type of an array's elements."""
    return {
        types.float32: ir.FloatType(),
        types.uint16: ir.IntType(16),
        types.int16: ir.HalfType(),
        types.int8: ir.IntType(8),
        types.uint8: ir.IntType(8),
    }[array_type.dtype]


def address_of(context: Any, builder: Any, array_type: Any, args: Any, element: Any, width: int) -> Any:
    """Return where `width` elements begin, for an intrinsic whose first arguments are an array and an index."""
    array = context.make_array(array_type)(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [args[1]]), vector_of(element, width).as_pointer())


def _fused(builder: Any, left: Any, right: Any, to: Any) -> Any:
    vector = left.type
    function = ir.FunctionType(vector, [vector] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function, f"llvm.fma.v{vector.count}f32"), [left, right, to]
    )


def splat(builder: Any, scalar: Any, width: int) -> Any:
    """Return a run of one value."""
    undefined = ir.Constant(vector_of(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, first, [0] * width)


def _shuffle(builder: Any, value: Any, picks: Any) -> Any:
    picks = list(picks)
    return builder.shuffle_vector(
        value, ir.Constant(value.type, ir.Undefined), ir.Constant(vector_of(ir.IntType(32), len(picks)), picks)
    )


def _half_of_e4m3(builder: Any, value: Any, width: int) -> Any:
    """Return e4m3 / 256 as fp16: exponent and fraction moved to where fp16 has its own, which holds for subnormals."""
    words = vector_of(ir.IntType(16), width)
    bits = builder.shl(builder.sext(value, words), ir.Constant(words, [7] * width))
    bits = builder.and_(bits, ir.Constant(words, [0xBFFF] * width))  # the sign stands once, not twice
    return builder.bitcast(bits, vector_of(ir.HalfType(), width))


def _round_to_bf16(builder: Any, run: Any, width: int) -> Any:
    words = vector_of(ir.IntType(32), width)

    def constant(number: int) -> Any:
        return ir.Constant(words, [number] * width)

    bits = builder.bitcast(run, words)
    odd = builder.and_(builder.lshr(bits, constant(_HALF_BITS)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(_HALF_BITS))
    is_nan = builder.fcmp_unordered("uno", run, run)
    # Rounding up may carry a NaN's payload into infinity or the sign, so NaN keeps its own pattern.
    return builder.trunc(builder.select(is_nan, constant(0x7FC0), rounded), vector_of(ir.IntType(16), width))

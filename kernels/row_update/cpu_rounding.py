"""Stochastic rounding inside numba kernels: what is written in bf16, and Adam's moments in a byte each; see `rule`."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from mfdist.kernels.lanes import address_of, element_of, generate_load, splat, vector_of

_FRACTION_BITS = 23  # of fp32
_HALF_FRACTION_BITS = 10  # of fp16
_HALF_BITS = 16
#: Bytes have fp16's exponents, of the value times its inverse.
_UNIT = 2.0**-14
#: fp32 bits of the least value with a whole fraction, and of the largest.
_LEAST, _LARGEST = 0x31800000, 0x40600000  # 2^-28, 3.5
_MOMENTUM, _ROOT = 2, 3  # bits of fraction in a byte


@intrinsic
def store_at_random(typing_context: Any, array: Any, index: Any, value: Any, key: Any, column: Any) -> Any:
    """Write a run at `array[index]`; bf16 is rounded up or down at random, other formats to the nearest even value.

    Args:
        array: fp32, bf16 or fp16.
        index: where its first value goes.
        value: the run.
        key: uint32, the row's key; see `rule`.
        column: int64, the column of the run's first value.
    """
    return types.void(array, types.intp, value, types.uint32, types.int64), _generate_store


def _generate_store(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array_type, _, lanes, _, _ = signature.args
    run = args[2]
    if array_type.dtype == types.uint16:
        run = _bf16_at_random(builder, run, _random_words(builder, args[3], args[4], lanes.width), lanes.width)
    elif array_type.dtype == types.int16:
        run = builder.fptrunc(run, vector_of(ir.HalfType(), lanes.width))
    return _write(context, builder, signature, args, run)


def _loads_moment(fraction: int) -> Callable[..., Any]:
    @intrinsic
    def load_moment(typing_context: Any, array: Any, index: Any, like: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array_type, _, lanes = signature.args
            if array_type.dtype != types.uint8:
                return generate_load(context, builder, signature, args)
            element, words = element_of(array_type), vector_of(ir.IntType(16), lanes.width)
            kept = builder.load(address_of(context, builder, array_type, args, element, lanes.width))
            kept.align = 1
            shift = ir.Constant(words, [_HALF_FRACTION_BITS - fraction] * lanes.width)
            halves = builder.bitcast(
                builder.shl(builder.zext(kept, words), shift), vector_of(ir.HalfType(), lanes.width)
            )
            floats = vector_of(ir.FloatType(), lanes.width)
            value = builder.fmul(builder.fpext(halves, floats), ir.Constant(floats, [_UNIT] * lanes.width))
            return builder.fmul(value, value) if fraction == _ROOT else value

        return like(array, types.intp, like), generate

    made: Callable[..., Any] = load_moment
    return made


def _stores_moment(fraction: int) -> Callable[..., Any]:
    @intrinsic
    def store_moment(typing_context: Any, array: Any, index: Any, value: Any, key: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array_type, _, lanes, _, _ = signature.args
            if array_type.dtype != types.uint8:
                return _generate_store(context, builder, signature, args)
            run = args[2]
            if fraction == _ROOT:
                name = f"llvm.sqrt.v{lanes.width}f32"
                root = cgutils.get_or_insert_function(builder.module, ir.FunctionType(run.type, [run.type]), name)
                run = builder.call(root, [run])
            random = _random_words(builder, args[3], args[4], lanes.width)
            return _write(
                context, builder, signature, args, _byte_at_random(builder, run, random, lanes.width, fraction)
            )

        return types.void(array, types.intp, value, types.uint32, types.int64), generate

    made: Callable[..., Any] = store_moment
    return made


#: As `load` and `store_at_random`, of states that may be bytes too; the second moment is kept as its root.
load_momentum, load_variance = _loads_moment(_MOMENTUM), _loads_moment(_ROOT)
store_momentum, store_variance = _stores_moment(_MOMENTUM), _stores_moment(_ROOT)


def _write(context: Any, builder: Any, signature: Any, args: Any, run: Any) -> Any:
    array_type, _, lanes, _, _ = signature.args
    element = element_of(array_type)
    written = builder.store(run, address_of(context, builder, array_type, args, element, lanes.width))
    written.align = array_type.dtype.bitwidth // 8
    return context.get_dummy_value()


def _random_words(builder: Any, key: Any, column: Any, width: int) -> Any:
    words = vector_of(ir.IntType(32), width)

    def constant(number: int) -> Any:
        return ir.Constant(words, [number] * width)

    def shifted(value: Any, bits: int) -> Any:
        return builder.xor(value, builder.lshr(value, constant(bits)))

    columns = splat(builder, builder.trunc(column, ir.IntType(32)), width)
    columns = builder.add(columns, ir.Constant(words, list(range(width))))
    x = builder.add(builder.mul(columns, constant(0x9E3779B9)), splat(builder, key, width))
    x = builder.mul(shifted(x, 16), constant(0x7FEB352D))
    x = builder.mul(shifted(x, 15), constant(0x846CA68B))
    return shifted(x, 16)


def _bf16_at_random(builder: Any, run: Any, random: Any, width: int) -> Any:
    words = vector_of(ir.IntType(32), width)

    def constant(number: int) -> Any:
        return ir.Constant(words, [number] * width)

    bits = builder.bitcast(run, words)
    exponent = constant(0x7F800000)
    is_special = builder.icmp_unsigned("==", builder.and_(bits, exponent), exponent)
    # Infinity and NaN have no next value. A NaN that arithmetic or bf16 gives has bits in its upper half, which stay.
    random = builder.select(is_special, constant(0), builder.lshr(random, constant(_HALF_BITS)))
    rounded = builder.lshr(builder.add(bits, random), constant(_HALF_BITS))
    return builder.trunc(rounded, vector_of(ir.IntType(16), width))


def _byte_at_random(builder: Any, run: Any, random: Any, width: int, fraction: int) -> Any:
    words = vector_of(ir.IntType(32), width)

    def constant(number: int) -> Any:
        return ir.Constant(words, [number] * width)

    bits, least, dropped = builder.bitcast(run, words), constant(_LEAST), _FRACTION_BITS - fraction
    size = builder.and_(bits, constant(0x7FFFFFFF))
    is_larger = builder.icmp_unsigned(">", size, constant(_LARGEST))
    size = builder.select(is_larger, constant(_LARGEST), size)
    # Added to the least value with a whole fraction, a smaller one has as many bits below the point as bytes' have.
    added = builder.fadd(builder.bitcast(size, run.type), builder.bitcast(least, run.type))
    is_small = builder.icmp_unsigned("<", size, least)
    above = builder.add(size, constant(1 << _FRACTION_BITS))
    place = builder.sub(builder.select(is_small, builder.bitcast(added, words), above), least)
    place = builder.add(place, builder.lshr(random, constant(32 - dropped)))
    sign = builder.shl(builder.lshr(bits, constant(31)), constant(7))
    made = builder.or_(builder.lshr(place, constant(dropped)), sign)
    return builder.trunc(made, vector_of(ir.IntType(8), width))

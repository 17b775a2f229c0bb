"""The rules and stochastic rounding inside numba kernels: what becomes of one row by its gradient."""

from typing import Any, NamedTuple

import numpy as np

from mfdist.kernels.cpu_threads import jit_part
from mfdist.kernels.lanes import (
    MIDDLE,
    NARROW,
    load,
    over_root,
    product_add,
    scaled,
    scaled_add,
    total,
    zeros_middle,
    zeros_narrow,
    zeros_single,
)
from mfdist.kernels.row_update.cpu_rounding import (
    load_momentum,
    load_variance,
    store_at_random,
    store_momentum,
    store_variance,
)
from mfdist.kernels.row_update.reference import mix64
from mfdist.kernels.row_update.rule import RowRule

_SGD, _ROWWISE_ADAGRAD, _ADAM = 0, 1, 2
_NUMBERS = {"sgd": _SGD, "rowwise_adagrad": _ROWWISE_ADAGRAD, "adam": _ADAM}
_ALL_64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_ONE, _INFINITY = np.float32(1), np.float32(np.inf)


class Rule(NamedTuple):
    """What all rows of a step share: fp32 numbers, the streams' keys, and where the table's part begins."""

    kind: int
    lr: Any
    decay: Any  # 1 − lr · weight_decay
    eps: Any
    beta1: Any
    rest1: Any  # 1 − beta1
    beta2: Any  # of what row-wise Adagrad has accumulated, too
    rest2: Any
    corrected_lr: Any  # lr / (1 − beta1ᵗ)
    correction2: Any  # 1 / (1 − beta2ᵗ)
    row_key: Any
    first_key: Any
    second_key: Any
    row_offset: int
    column_offset: int


def rule_of_step(rule: RowRule, lr: float, step: int, offsets: tuple[int, int]) -> Rule:
    """Return a rule as the kernels take it at one step."""
    beta1, beta2 = rule.betas
    second = rule.accumulation if rule.kind == "rowwise_adagrad" else (beta2, 1 - beta2)
    numbers = (
        lr, 1 - lr * rule.weight_decay, rule.eps, beta1, 1 - beta1, *second,
        lr / (1 - beta1**step) if rule.kind == "adam" and step else 0.0,
        1 / (1 - beta2**step) if rule.kind == "adam" and step else 0.0,
    )  # fmt: skip
    base = mix64(rule.seed) + 4 * step
    keys = [np.uint64(mix64((base + stream) & _ALL_64)) for stream in range(3)]
    fields: list[Any] = [_NUMBERS[rule.kind], *map(np.float32, numbers), *keys, *offsets]
    return Rule(*fields)


@jit_part()
def mean_square(grads: Any, start: Any, D: Any) -> Any:
    """Return the mean of the squares of `grads[start : start + D]`."""
    middle, narrow, single = zeros_middle(), zeros_narrow(), zeros_single()
    column = 0
    while column + MIDDLE <= D:
        run = load(grads, start + column, middle)
        middle = product_add(run, run, middle)
        column += MIDDLE
    while column + NARROW <= D:
        part = load(grads, start + column, narrow)
        narrow = product_add(part, part, narrow)
        column += NARROW
    while column < D:
        end = load(grads, start + column, single)
        single = product_add(end, end, single)
        column += 1
    return (total(middle) + total(narrow) + total(single)) / np.float32(D)


@jit_part()
def update_row(
    table: Any, first: Any, second: Any, rule: Any, row: Any, D: Any, grads: Any, start: Any, square: Any
) -> None:
    """Update one row and its state by the gradient `grads[start : start + D]`, unless that is not finite.

    Args:
        table: flat rows.
        first: the rule's first state, flat, or empty.
        second: its second state, flat, or empty.
        rule: from `rule_of_step`.
        row: this table's row.
        D: the row's width here.
        grads: gradients, flat.
        start: where the row's begins.
        square: the mean of the gradient's squares over the whole row.
    """
    if not square < _INFINITY:
        return
    rate = rule.lr
    if rule.kind == _ROWWISE_ADAGRAD:
        if first[row] > 0:
            square = rule.beta2 * first[row] + rule.rest2 * square
        first[row] = square
        rate = rule.lr / (np.float32(np.sqrt(first[row])) + rule.eps)
    number = np.uint64(row + rule.row_offset)
    keys = (_key(rule.row_key, number), _key(rule.first_key, number), _key(rule.second_key, number))
    column = 0
    while column + MIDDLE <= D:
        _update_tile(table, first, second, rule, keys, rate, row * D + column, column, grads, start, zeros_middle())
        column += MIDDLE
    while column + NARROW <= D:
        _update_tile(table, first, second, rule, keys, rate, row * D + column, column, grads, start, zeros_narrow())
        column += NARROW
    while column < D:
        _update_tile(table, first, second, rule, keys, rate, row * D + column, column, grads, start, zeros_single())
        column += 1


@jit_part()
def _update_tile(
    table: Any,
    first: Any,
    second: Any,
    rule: Any,
    keys: Any,
    rate: Any,
    at: Any,
    column: Any,
    grads: Any,
    start: Any,
    zeros: Any,
) -> None:
    gradient = load(grads, start + column, zeros)
    updated = scaled(load(table, at, zeros), rule.decay)
    place = column + rule.column_offset
    if rule.kind == _ADAM:
        momentum = scaled_add(load_momentum(first, at, zeros), rule.beta1, scaled(gradient, rule.rest1))
        squares = product_add(gradient, scaled(gradient, rule.rest2), zeros)
        variance = scaled_add(load_variance(second, at, zeros), rule.beta2, squares)
        change = over_root(momentum, scaled(variance, rule.correction2), rule.eps)
        updated = scaled_add(change, -rule.corrected_lr, updated)
        store_momentum(first, at, momentum, keys[1], place)
        store_variance(second, at, variance, keys[2], place)
    else:
        updated = scaled_add(gradient, -rate, updated)
    store_at_random(table, at, updated, keys[0], place)


@jit_part()
def _key(stream: Any, row: Any) -> Any:
    """Return a row's 32-bit key; see `rule`."""
    x = stream + row * _GOLDEN
    x = (x ^ (x >> _S30)) * _FACTOR_1
    x = (x ^ (x >> _S27)) * _FACTOR_2
    return np.uint32((x ^ (x >> _S31)) >> _S32)

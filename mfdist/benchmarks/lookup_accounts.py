"""What is asked of whoever does a lookup: how close results must come to float64, and which bytes a rate counts."""

from collections.abc import Callable

import torch
from torch import Tensor

from mfdist.benchmarks import exact
from mfdist.benchmarks.contender import Distance, Outputs
from mfdist.benchmarks.lookup_case import LookupCase, LookupTensors
from mfdist.kernels.gather_sum.reference import global_ids
from mfdist.kernels.row_update import RowRule

#: Large when checking, so that a wrong update shows beside the rows; small when timing, because rows are updated often.
CHECKED_LR, TIMED_LR = 0.1, 1e-4

Measure = Callable[[Outputs], list[Distance]]


def sum_distances(table: Tensor, row_ids: Tensor, scores: Tensor, stride: int, scales: Tensor | None = None) -> Measure:
    """Return the measure of gather_sum's output."""

    def measure(outputs: Outputs) -> list[Distance]:
        parts = exact.sums(table, row_ids, scores, stride, scales)
        return [Distance(outputs[0].dtype, ((outputs[0][tokens], expected) for tokens, expected in parts))]

    return measure


def gradient_distances(table: Tensor, row_ids: Tensor, scores: Tensor, grad: Tensor, stride: int) -> Measure:
    """Return the measure of row_gradient's two outputs."""

    def measure(outputs: Outputs) -> list[Distance]:
        grad_table, grad_scores = outputs
        row_parts = exact.row_gradients(table.shape[0], row_ids, scores, grad, stride)
        score_parts = exact.score_gradients(table, row_ids, grad, stride)
        return [
            Distance(grad_table.dtype, ((grad_table[rows], expected) for rows, expected in row_parts)),
            Distance(grad_scores.dtype, ((grad_scores[tokens], expected) for tokens, expected in score_parts)),
        ]

    return measure


def update_distances(tensors: LookupTensors, table: Tensor, grad: Tensor, rule: RowRule) -> Measure:
    """Return the measure of an update by CHECKED_LR: of the rows, the scores' gradients, and the state if there is any.

    Args:
        tensors: the lookup.
        table: the rows before.
        grad: the gradient of its output.
        rule: `sgd` or `rowwise_adagrad`, from a state of zeros, without decay.
    """
    row_ids, scores, stride = tensors.row_ids[0], tensors.scores, tensors.case.code_stride

    def measure(outputs: Outputs) -> list[Distance]:
        updated, grad_scores, *state = outputs
        rows_distance, state_distance = Distance(updated.dtype), Distance(torch.float32)
        for rows, gradient in exact.row_gradients(table.shape[0], row_ids, scores, grad, stride):
            change = CHECKED_LR * gradient
            if state:
                mean_squares = gradient.square().mean(1)
                state_distance.add(state[0][rows], mean_squares)
                change /= mean_squares.sqrt()[:, None] + rule.eps
            rows_distance.add(updated[rows], table[rows].double() - change)
        parts = exact.score_gradients(table, row_ids, grad, stride)
        scores_distance = Distance(grad_scores.dtype, ((grad_scores[tokens], right) for tokens, right in parts))
        return [rows_distance, scores_distance, state_distance]

    return measure


def gradient_bytes(case: LookupCase, table: Tensor) -> int:
    """Return the bytes of grad_output and of rows read once a lookup, and of the gradient written."""
    return 2 * case.num_elements * table.itemsize + table.nbytes


def update_bytes(tensors: LookupTensors, table: Tensor) -> int:
    """Return the bytes of grad_output read once a lookup, and of each row that is looked up, read and written."""
    ids = global_ids(tensors.row_ids[0], tensors.case.code_stride)
    num_touched = int(torch.bincount(ids.flatten(), minlength=table.shape[0]).count_nonzero())
    return (tensors.case.num_elements + 2 * num_touched * table.shape[1]) * table.itemsize

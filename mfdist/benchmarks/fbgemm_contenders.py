"""FBGEMM's table-batched embeddings, where fbgemm_gpu is installed: one table, a bag of K rows for each token.

On a GPU in fp16, because it trains no tables in bf16; on a CPU in fp32. Its optimisers are fused into its backward.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfdist.benchmarks.contender import Contender, Outputs
from mfdist.benchmarks.lookup_accounts import CHECKED_LR, TIMED_LR, sum_distances, update_bytes, update_distances
from mfdist.benchmarks.lookup_case import LookupTensors
from mfdist.benchmarks.timing import Work
from mfdist.kernels.gather_sum.reference import global_ids
from mfdist.kernels.row_update import RowRule

_DTYPES = {"cpu": ("fp32", torch.float32), "cuda": ("fp16", torch.float16)}


def sums(tensors: LookupTensors) -> dict[str, Callable[[], Contender]]:
    """Return its forward by name, or nothing where it is not installed."""
    return {} if _is_missing() else {f"fbgemm-{_DTYPES[tensors.device][0]}": functools.partial(_sum, tensors)}


def updates(tensors: LookupTensors, rule: RowRule) -> dict[str, Callable[[], Contender]]:
    """Return its backward with a rule fused in, or nothing where it is not installed."""
    name = f"fbgemm-{_DTYPES[tensors.device][0]}"
    return {} if _is_missing() else {name: functools.partial(_update, tensors, rule)}


def _is_missing() -> bool:
    return importlib.util.find_spec("fbgemm_gpu") is None


def _sum(tensors: LookupTensors) -> Contender:
    ids, scores, stride = tensors.row_ids, tensors.scores, tensors.case.code_stride
    module, table = _module(tensors, "sgd", 0.0)
    bags = [_bags(each, stride) for each in ids]

    def call(number: int) -> Tensor:
        out: Tensor = module(*bags[number % len(bags)], per_sample_weights=scores.flatten())
        return out

    return Contender(
        work=Work(call, len(ids), is_capturable=False),
        outputs=lambda: (call(0),),
        distances=sum_distances(table, ids[0], scores, stride),
        num_bytes=tensors.case.num_elements * table.itemsize,
    )


def _update(tensors: LookupTensors, rule: RowRule) -> Contender:
    scores = tensors.scores.flatten().requires_grad_()
    module, table = _module(tensors, rule.kind, CHECKED_LR)
    grad = tensors.grad_output(table.dtype)
    with torch.enable_grad():
        out = module(*_bags(tensors.row_ids[0], tensors.case.code_stride), per_sample_weights=scores)

    def update() -> Tensor:
        (grad_scores,) = torch.autograd.grad(out, [scores], grad, retain_graph=True)
        return grad_scores.view_as(tensors.scores)

    def once() -> Outputs:
        (weights,) = module.split_embedding_weights()
        states = module.split_optimizer_states()[0] if rule.num_states else ()
        weights.data.copy_(table)  # unseen by autograd, which would refuse the backward of an earlier forward
        for state in states:
            state.data.zero_()
        grad_scores = update()
        return weights.clone(), grad_scores, *(state.clone() for state in states)

    def time_it(number: int) -> Tensor:
        if number == 0:
            module.set_learning_rate(TIMED_LR)
        return update()

    return Contender(
        work=Work(time_it, is_capturable=False),
        outputs=once,
        distances=update_distances(tensors, table, grad, rule),
        num_bytes=update_bytes(tensors, table),
    )


def _module(tensors: LookupTensors, kind: str, lr: float) -> tuple[Any, Tensor]:
    """Return a table-batched embedding of one table, and a copy of its rows."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    is_gpu = tensors.device == "cuda"
    kind_name, dtype = _DTYPES[tensors.device]
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if is_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    optimizers = {"sgd": EmbOptimType.EXACT_SGD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(tensors.case.num_rows, tensors.case.row_dim, *place)],
        weights_precision=SparseType(kind_name),
        output_dtype=SparseType(kind_name),
        optimizer=optimizers[kind],
        learning_rate=lr,
        device=torch.device(tensors.device),
    )
    table = tensors.table(dtype)
    module.split_embedding_weights()[0].copy_(table)
    return module, table


def _bags(row_ids: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return the rows of all tokens one after the other, and where each token's begin."""
    rows = global_ids(row_ids, stride).flatten()
    offsets = torch.arange(0, rows.numel() + 1, row_ids.shape[1], device=rows.device)
    return rows, offsets

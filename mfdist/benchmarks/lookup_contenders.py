"""Who does a lookup: mfdist's kernels and torch's F.embedding_bag, forward and backward."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mfdist.benchmarks import fbgemm_contenders
from mfdist.benchmarks.contender import Comparison, Contender, Outputs
from mfdist.benchmarks.lookup_accounts import gradient_bytes, gradient_distances, sum_distances
from mfdist.benchmarks.lookup_case import BYTES, FLOATS, LookupCase, LookupTensors
from mfdist.benchmarks.timing import Work
from mfdist.kernels import gather_sum, quantize, quantized_gather_sum, row_gradient
from mfdist.kernels.gather_sum.reference import global_ids


def comparisons(name: str, case: LookupCase, device: str) -> Iterator[Comparison]:
    """Yield what is compared on a case; its tensors are made once and go when the iterator does."""
    tensors = LookupTensors(case, device)
    floats = {kind: dtype for kind, dtype in FLOATS.items() if kind in case.dtypes}
    quantised = {kind: dtype for kind, dtype in BYTES.items() if kind in case.dtypes}
    has_baseline = not case.is_skewed

    def offer(make: Callable[..., Contender], *arguments: object) -> Callable[[], Contender]:
        return lambda: make(tensors, *arguments)

    forward = {f"mfdist-{kind}": offer(sums, dtype) for kind, dtype in floats.items()}
    out_dtype = next(iter(floats.values())) if device == "cpu" else torch.bfloat16
    forward |= {f"mfdist-{kind}": offer(_quantized_sum, dtype, out_dtype) for kind, dtype in quantised.items()}
    if has_baseline:
        forward |= {f"torch-{kind}": offer(_bag, dtype) for kind, dtype in floats.items()}
        forward |= fbgemm_contenders.sums(tensors)
    yield Comparison(op="gather_sum", case=name, ceiling="read", is_inference=True, contenders=forward)
    if not case.has_backward:
        return
    backward = {f"mfdist-{kind}": offer(_gradient, dtype) for kind, dtype in floats.items()}
    if has_baseline and "fp32" in floats:  # it has no other backward with weights
        backward["torch-fp32"] = offer(_bag_gradient)
    yield Comparison(op="row_gradient", case=name, ceiling="copy", contenders=backward)


def sums(tensors: LookupTensors, dtype: torch.dtype) -> Contender:
    """Return mfdist's lookup."""
    table, ids, scores, stride = _arguments(tensors, dtype)

    def call(number: int) -> Tensor:
        return gather_sum(table, ids[number % len(ids)], scores, stride)

    return Contender(
        work=Work(call, len(ids)),
        outputs=lambda: (call(0),),
        distances=sum_distances(table, ids[0], scores, stride),
        num_bytes=tensors.case.num_elements * table.itemsize,
        repeats=True,
    )


def _quantized_sum(tensors: LookupTensors, dtype: torch.dtype, out_dtype: torch.dtype) -> Contender:
    table, ids, scores, stride = _arguments(tensors, out_dtype)
    rows = quantize(table, dtype)

    def call(number: int) -> Tensor:
        return quantized_gather_sum(rows, ids[number % len(ids)], scores, stride, dtype=out_dtype)

    return Contender(
        work=Work(call, len(ids)),
        outputs=lambda: (call(0),),
        distances=sum_distances(rows.values, ids[0], scores, stride, rows.scales),
        num_bytes=tensors.case.num_elements,
        repeats=True,
    )


def _bag(tensors: LookupTensors, dtype: torch.dtype) -> Contender:
    table, ids, scores, stride = _arguments(tensors, dtype)
    rows = [global_ids(each, stride) for each in ids]
    weights = scores.to(dtype)  # it takes no others

    def call(number: int) -> Tensor:
        return F.embedding_bag(rows[number % len(rows)], table, mode="sum", per_sample_weights=weights)

    return Contender(
        work=Work(call, len(ids)),
        outputs=lambda: (call(0),),
        distances=sum_distances(table, ids[0], weights, stride),
        num_bytes=tensors.case.num_elements * table.itemsize,
    )


def _gradient(tensors: LookupTensors, dtype: torch.dtype) -> Contender:
    table, ids, scores, stride = _arguments(tensors, dtype)
    grad = tensors.grad_output(dtype)

    def call() -> Outputs:
        return row_gradient(table, ids[0], scores, grad, stride)

    return Contender(
        work=Work(lambda _: call()),
        outputs=call,
        distances=gradient_distances(table, ids[0], scores, grad, stride),
        num_bytes=gradient_bytes(tensors.case, table),
        repeats=True,
        step=lambda: (gather_sum(table, ids[0], scores, stride), *call()),
    )


def _bag_gradient(tensors: LookupTensors) -> Contender:
    table, ids, scores, stride = _arguments(tensors, torch.float32)
    grad = tensors.grad_output(torch.float32)
    leaves = (table.detach().requires_grad_(), scores.detach().requires_grad_())
    with torch.enable_grad():
        out = F.embedding_bag(global_ids(ids[0], stride), leaves[0], mode="sum", per_sample_weights=leaves[1])

    def call() -> Outputs:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return Contender(
        work=Work(lambda _: call(), is_capturable=False),
        outputs=call,
        distances=gradient_distances(table, ids[0], scores, grad, stride),
        num_bytes=gradient_bytes(tensors.case, table),
    )


def _arguments(tensors: LookupTensors, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor, int]:
    return tensors.table(dtype), tensors.row_ids, tensors.scores, tensors.case.code_stride

"""Who updates rows in the backward pass: mfdist's fused row optimisers."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mfdist.benchmarks import fbgemm_contenders
from mfdist.benchmarks.contender import Comparison, Contender, Outputs
from mfdist.benchmarks.lookup_accounts import CHECKED_LR, TIMED_LR, update_bytes, update_distances
from mfdist.benchmarks.lookup_case import FLOATS, LookupCase, LookupTensors
from mfdist.benchmarks.timing import Work
from mfdist.kernels.row_update import RowRule, fused_row_update

RULES = {"row_update_sgd": RowRule(kind="sgd"), "row_update_adagrad": RowRule(kind="rowwise_adagrad", betas=(0.0, 1.0))}


def comparisons(name: str, case: LookupCase, device: str) -> Iterator[Comparison]:
    """Yield both rules; the gradients of the scores and sorting are part of the work."""
    tensors = LookupTensors(case, device)
    for op, rule in RULES.items():
        contenders: dict[str, Callable[[], Contender]] = {
            f"mfdist-{kind}": functools.partial(fused, tensors, FLOATS[kind], rule)
            for kind in case.dtypes
            if kind in FLOATS
        }
        if not case.is_skewed:
            contenders |= fbgemm_contenders.updates(tensors, rule)
        yield Comparison(op=op, case=name, ceiling="copy", contenders=contenders)


def fused(tensors: LookupTensors, dtype: torch.dtype, rule: RowRule) -> Contender:
    """Return mfdist's update in backward, with the gradients of the scores."""
    rows, ids, scores = tensors.table(dtype), tensors.row_ids[0], tensors.scores
    grad, stride = tensors.grad_output(dtype), tensors.case.code_stride
    step = torch.ones((), dtype=torch.int64, device=rows.device)

    def fresh() -> tuple[Tensor, list[Tensor]]:
        return rows.clone(), [torch.zeros(rows.shape[0], device=rows.device) for _ in range(rule.num_states)]

    def update(table: Tensor, state: list[Tensor], lr: Tensor) -> Tensor:
        return fused_row_update(table, state, ids, scores, grad, rule, lr, step, code_stride=stride)

    def once() -> Outputs:
        table, state = fresh()
        grad_scores = update(table, state, torch.full((), CHECKED_LR, device=rows.device))
        return table, grad_scores, *state

    timed = functools.cache(fresh)
    timed_lr = torch.full((), TIMED_LR, device=rows.device)
    return Contender(
        work=Work(lambda _: update(*timed(), timed_lr)),
        outputs=once,
        distances=update_distances(tensors, rows, grad, rule),
        num_bytes=update_bytes(tensors, rows),
        repeats=True,
    )

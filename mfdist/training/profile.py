"""Measuring what a step's time goes to."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")

LOOKUPS, REST = "lookups", "everything else"
#: What an operator counts as, by what its name contains; the first that fits.
_KINDS = (
    (
        "attention",
        ("scaled_dot_product", "flash_attention", "efficient_attention", "one_token_attention", "::rotation"),
    ),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")),
    (LOOKUPS, ("mfdist",)),
    # `_Lookup` is that of sharded tables and of tables on servers, whose own time is waiting for the others.
    ("exchanges", ("gloo:", "nccl:", "c10d::", "all_reduce", "all_to_all", "_lookup", "distributeddataparallel")),
    ("loss", ("log_softmax", "nll_loss", "cross_entropy")),
    ("optimiser", ("adam", "optimizer.step", "foreach", "linalg_vector_norm")),
)


def time_shares(work: Callable[[], T], device: torch.device) -> tuple[T, dict[str, float]]:
    """Run `work` under torch's profiler; return its result and the shares of operator time by kind.

    The shares are of the device's time on a GPU and of the operators' own time on a CPU. Of each kind, forward and
    backward count; `lookups` are mfdist's kernels: hashing, lookups and their gradients, rows updated in backward.
    """
    # torch 2.13's profiler logs its own start and stop to stderr, in the middle of a progress display.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        result = work()
        if is_gpu:
            torch.cuda.synchronize(device)
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type.name == "CPU":  # on a GPU a kernel's time is its operator's already
            kind = _kind(event.key)
            own = event.self_device_time_total if is_gpu else event.self_cpu_time_total
            spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    return result, {kind: own / total for kind, own in spent.items() if own > 0}


def _kind(operator: str) -> str:
    name = operator.lower()
    return next((kind for kind, parts in _KINDS if any(part in name for part in parts)), REST)

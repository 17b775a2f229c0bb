"""Measuring which share of a step the lookups take."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def lookup_share(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Run `work` under torch's profiler; return its result and the share of operator time spent in mfdist's kernels.

    The share is of the device's time on a GPU and of the operators' own time on a CPU; forward and backward of
    hashing and lookup both count.
    """
    # torch 2.13's profiler logs its own start and stop to stderr, in the middle of a progress display.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        result = work()
        if is_gpu:
            torch.cuda.synchronize(device)
    total = own = 0.0
    for event in profiler.key_averages():
        spent = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        total += spent
        own += spent if "mfdist" in event.key else 0.0
    return result, own / total if total else 0.0

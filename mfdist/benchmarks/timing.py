"""How long a call takes: on a GPU the device's own time, on a CPU the median of turns taken one after the other.

With one CPU thread it is processor time, which is right also on a machine that is busy with other things.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: A graph, or a turn, lasts at least this long, so that starting it does not count.
_LEAST_US = {"cuda": 200.0, "cpu": 500.0}
_MAX_CALLS = 128
_MIN_TURNS = 5
_MAX_TURNS = 1000


class Work(NamedTuple):
    """Something to time."""

    #: One call. The argument counts calls: the first `num_variants` have inputs of their own, then they come again.
    call: Callable[[int], object]
    num_variants: int = 1
    #: Whether a CUDA graph can hold it, so that the device's time is measured without Python's.
    is_capturable: bool = True


class Timing(NamedTuple):
    """How long a call took: the median, and how far apart the quartiles are as a share of it; see `quartile_spread`."""

    median_us: float
    spread: float


def timings(works: Sequence[Work], device: str, seconds: float) -> list[Timing]:
    """Return how long a call of each takes.

    Args:
        works: called at least once before, because a first call compiles.
        device: "cuda" or "cpu". A GPU is ours alone and they are measured one by one; on a CPU, which is shared, they
            take turns, so that a slow moment falls on all.
        seconds: how long to measure each.
    """
    if device == "cuda":
        return [_on_gpu(work, seconds) for work in works]
    calls = [_calls(_clocked_us(work.call, 1), "cpu") for work in works]
    times: list[list[float]] = [[] for _ in works]
    until = time.perf_counter() + seconds * len(works)
    while works and _goes_on(len(times[0]), until):
        for work, count, taken in zip(works, calls, times, strict=True):
            taken.append(_clocked_us(work.call, count))
    return [_timing(taken) for taken in times]


def quartile_spread(times: Sequence[float]) -> float:
    """Return how far apart the quartiles of some times are, as a share of their median; NaN for a single one."""
    if len(times) < 2:
        return math.nan
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def extra_bytes(step: Callable[[], tuple[Tensor, ...]]) -> int:
    """Return the most GPU memory that a step held at a time beyond what was there and what it returned."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(output.nbytes for output in outputs)


def _timing(times: Sequence[float]) -> Timing:
    return Timing(statistics.median(times), quartile_spread(times))


def _on_gpu(work: Work, seconds: float) -> Timing:
    if not work.is_capturable:
        return _timing(_device_times_us(work.call, _calls(_device_us(work.call, 1), "cuda"), seconds))
    calls = work.num_variants
    graph = _captured(work.call, calls)
    rounds = _calls(statistics.median(_device_times_us(lambda _: graph.replay(), 1, 0.0)), "cuda")
    if rounds > 1:
        calls *= rounds
        graph = _captured(work.call, calls)
    return _timing([each / calls for each in _device_times_us(lambda _: graph.replay(), 1, seconds)])


def _captured(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(0)
        stream.synchronize()
        torch.cuda.empty_cache()  # a graph's memory is its own, and none can be freed while it is captured
        with torch.cuda.graph(graph, stream=stream):
            for number in range(calls):
                call(number)
    return graph


def _device_times_us(call: Callable[[int], object], calls: int, seconds: float) -> list[float]:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while _goes_on(len(times), until):
        times.append(_device_us(call, calls))
    return times


def _device_us(call: Callable[[int], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for number in range(calls):
        call(number)
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / calls


def _clocked_us(call: Callable[[int], object], calls: int) -> float:
    # One thread's processor time is not lengthened by what else runs; several wait for each other besides.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for number in range(calls):
        call(number)
    return 1e6 * (clock() - began) / calls


def _calls(call_us: float, device: str) -> int:
    return min(_MAX_CALLS, max(1, round(_LEAST_US[device] / max(call_us, 1e-3))))


def _goes_on(turns: int, until: float) -> bool:
    return turns < _MIN_TURNS or (turns < _MAX_TURNS and time.perf_counter() < until)

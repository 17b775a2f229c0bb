# ruff: noqa: B023 - every lambda is called before its loop goes on
"""Checks every kernel of this device against a float64 reference, then times it against torch: `make bench`.

A time is reported only after results have been compared, with the rate at which the bytes of the rows alone would have
been read and its share of the measured copy bandwidth. On a GPU it is the device's time, from CUDA graphs, without
Python's; embedding_bag's backward, which cannot be captured, is timed as it is called.
Needs torch, numpy, numba and, on a GPU, triton.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfdist.kernels import check_errors, gather_sum, row_gradient, sign_hash
from mfdist.kernels.gather_sum import reference as sum_reference
from mfdist.kernels.row_gradient import reference as gradient_reference
from mfdist.kernels.sign_hash import reference as hash_reference
from mfdist.testing.tolerances import TOLERANCES

# name: tokens, lookups, rows of each lookup's table, row width
GPU_SHAPES = {
    "tiny-qkv": (32768, 64, 256, 512),
    "base-qkv": (16384, 128, 256, 1024),
    "base-ffn2": (16384, 128, 1024, 1024),
    "base-decode-1": (1, 128, 256, 1024),
    "base-decode-16": (16, 128, 256, 1024),
}
CPU_SHAPES = {
    "tiny-qkv": (4096, 64, 256, 512),
    "base-qkv": (2048, 128, 256, 1024),
    "base-ffn2": (2048, 128, 1024, 1024),
    "demo-qkv": (4096, 16, 256, 384),
    "demo-ffn1": (4096, 16, 256, 160),
    "demo-ffn2": (4096, 16, 1024, 128),
    "base-decode-1": (1, 128, 256, 1024),
    "base-decode-16": (16, 128, 256, 1024),
}
CHECKED_SHAPES = [
    *((num_tokens, 5, 16, row_dim) for num_tokens in (0, 1, 63, 100) for row_dim in (1, 40, 96, 1000)),
    (3, 0, 16, 40),
    (5, 200, 4, 96),
    (300, 3, 4096, 96),
]
_BITS = 8


def make(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], *, is_compact: bool, is_equal: bool) -> Any:
    """Return the arguments of gather_sum and a gradient of its output."""
    num_tokens, num_lookups, rows_each, row_dim = shape
    num_rows = max(1, num_lookups) * rows_each if not is_compact else num_lookups * rows_each
    limit = rows_each if is_compact else num_rows
    id_dtype = torch.uint8 if is_compact and rows_each <= 256 else torch.int32 if is_compact else torch.int64
    ids = torch.randint(0, limit, (num_tokens, num_lookups), device=device).to(id_dtype)
    return (
        torch.randn(num_rows, row_dim, device=device).to(dtype),
        ids.fill_(limit - 1) if is_equal else ids,
        torch.rand(num_tokens, num_lookups, device=device),
        torch.randn(num_tokens, row_dim, device=device).to(dtype),
        rows_each if is_compact else 0,
    )


def errors(got: Tensor, expected: Tensor, scale: Tensor | None) -> tuple[float, float]:
    """Return the Frobenius error relative to `scale`, or else to `expected`, and the largest difference.

    A single sum may cancel to nearly nothing, so sums are measured against those of their terms' absolute values.
    """
    if got.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(got.shape)}, {list(expected.shape)}")
    if not got.numel():
        return 0.0, 0.0
    difference = got.double() - expected
    size = float((expected if scale is None else scale).norm())
    return float(difference.norm()) / (size or 1.0), float(difference.abs().max())


class Report:
    """What has been found, printed as it is found."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []

    def check(self, name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        """Record one result's distance from the reference, and print it if it is too far."""
        relative, largest = errors(got, expected, scale)
        tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
        is_right = got.dtype == dtype and relative <= tolerance
        self.checks.append({"name": name, "relative": relative, "max": largest, "tolerance": tolerance, "ok": is_right})
        if not is_right:
            print(
                f"WRONG {name}: {got.dtype}, relative error {relative:.2e} (at most {tolerance:.0e}), max {largest:.2e}"
            )

    def check_equal(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Record whether two results are the same, and print it if not."""
        is_right = torch.equal(got, expected)
        self.checks.append({"name": name, "ok": is_right})
        if not is_right:
            print(f"WRONG {name}: {int((got != expected).sum())} of {got.numel()} values differ")

    @property
    def is_right(self) -> bool:
        """Whether every check has passed."""
        return all(check["ok"] for check in self.checks)


def check_lookups(report: Report, device: str) -> None:
    """Check gather_sum and row_gradient at small and odd shapes, and that repeats give the same bits."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for is_compact in (True, False):
            for shape in CHECKED_SHAPES:
                for is_equal in (False, True):
                    table, ids, scores, grad, stride = make(
                        device, dtype, shape, is_compact=is_compact, is_equal=is_equal
                    )
                    name = f"{shape} {str(dtype)[6:]} {'codes' if is_compact else 'ids'}{' equal' * is_equal}"
                    check_lookup(report, name, table, ids, scores, grad, stride)
    check_errors()


def check_lookup(
    report: Report, name: str, table: Tensor, ids: Tensor, scores: Tensor, grad: Tensor, stride: int
) -> None:
    """Check one lookup forward and backward."""
    wide = (table.double(), ids, scores.double())
    positive = (table.double().abs(), ids, scores.double().abs())
    out = gather_sum(table, ids, scores, stride)
    expected = sum_reference.gather_sum(*wide, stride)
    report.check(f"gather_sum {name}", out, expected, table.dtype, sum_reference.gather_sum(*positive, stride))
    got = row_gradient(table, ids, scores, grad, stride)
    grads = gradient_reference.row_gradient(*wide, grad.double(), stride)
    scales = gradient_reference.row_gradient(*positive, grad.double().abs(), stride)
    report.check(f"row_gradient table {name}", got[0], grads[0], table.dtype, scales[0])
    report.check(f"row_gradient scores {name}", got[1], grads[1], torch.float32, scales[1])
    again = (gather_sum(table, ids, scores, stride), *row_gradient(table, ids, scores, grad, stride))
    for part, first, second in zip(("output", "table", "scores"), (out, *got), again, strict=True):
        report.check_equal(f"repeat of {part} {name}", second, first)


def check_hashing(report: Report, device: str) -> None:
    """Check sign_hash and its gradient for both scores and several bits."""
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (1, 5, 8, 10, 24):
            for score in ("paper", "released"):
                for num_tokens in (0, 1, 63, 1000):
                    x = torch.randn(num_tokens, 6 * bits, device=device).to(dtype).requires_grad_()
                    grad = torch.randn(num_tokens, 6, device=device)
                    codes, scores = sign_hash(x, bits, score)
                    scores.backward(grad)  # type: ignore[no-untyped-call]
                    wide = x.detach().double()
                    expected_codes, expected = hash_reference.sign_hash(wide, bits, score, 1.0)
                    expected_grad = hash_reference.sign_hash_gradient(wide, grad.double(), bits, score, 1.0)
                    name = f"({num_tokens}, {6 * bits}) {str(dtype)[6:]} bits={bits} {score}"
                    report.check_equal(f"sign_hash codes {name}", codes.long(), expected_codes)
                    report.check(f"sign_hash scores {name}", scores.detach(), expected, torch.float32)
                    if x.grad is not None:
                        report.check(f"sign_hash gradient {name}", x.grad, expected_grad, dtype)


def device_ms(work: Callable[[], object], device: str, seconds: float) -> float:
    """Return the median time a GPU spends on a call, from replays of a CUDA graph; on a CPU, that of the call."""
    if device != "cuda":
        return median_ms(work, device, seconds)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
    return median_ms(graph.replay, device, seconds)


def median_ms(work: Callable[[], object], device: str, seconds: float) -> float:
    """Return the median time of a call, made again and again at once: CUDA events on a GPU, a clock on a CPU."""
    work()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 500):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def copy_bandwidth(device: str, seconds: float) -> float:
    """Return bytes a second, read and written, of a large copy."""
    source = torch.zeros((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), device, seconds)


def time_lookups(report: Report, device: str, seconds: float, bandwidth: float) -> None:
    """Time forward and backward of each shape beside F.embedding_bag and print the table."""
    print(f"\n{'shape':<16}{'rows':<6}{'':<10}{'ms':>9}{'bag ms':>9}{'ratio':>7}{'GB/s':>8}{'of copy':>9}")
    for name, shape in (GPU_SHAPES if device == "cuda" else CPU_SHAPES).items():
        for dtype in (torch.float32, torch.bfloat16):
            table, ids, scores, grad, stride = make(device, dtype, shape, is_compact=True, is_equal=False)
            row_ids = ids.long() + stride * torch.arange(shape[1], device=device)
            with torch.inference_mode():
                few = slice(0, 64)
                expected = sum_reference.gather_sum(table.double(), ids[few], scores[few].double(), stride)
                report.check(
                    f"timed gather_sum {name}", gather_sum(table, ids[few], scores[few], stride), expected, dtype
                )
                ours = device_ms(lambda: gather_sum(table, ids, scores, stride), device, seconds)
                bag_scores = scores.to(dtype)
                bag = device_ms(
                    lambda: F.embedding_bag(row_ids, table, mode="sum", per_sample_weights=bag_scores),
                    device,
                    seconds,
                )
            one_pass = ids.numel() * shape[3] * table.itemsize
            add_time(report, name, dtype, "forward", ours, bag, one_pass, bandwidth)
            if shape[0] < 64:
                continue
            if device == "cuda":
                check_timed_gradient(report, name, table, ids, scores, grad, stride)
            ours = device_ms(lambda: row_gradient(table, ids, scores, grad, stride), device, seconds)
            bag = bag_backward(table, row_ids, scores, grad, device, seconds) if dtype == torch.float32 else None
            add_time(report, name, dtype, "backward", ours, bag, 2 * one_pass + table.nbytes, bandwidth)


def check_timed_gradient(
    report: Report, name: str, table: Tensor, ids: Tensor, scores: Tensor, grad: Tensor, stride: int
) -> None:
    """Check row_gradient at a timed shape, one lookup of all tokens at a time: all of them would not fit in fp64."""
    got = row_gradient(table, ids, scores, grad, stride)
    expected = torch.zeros_like(table, dtype=torch.float64)
    for k in range(ids.shape[1]):
        one = slice(k * stride, (k + 1) * stride)
        part = (table[one].double(), ids[:, k : k + 1], scores[:, k : k + 1].double(), grad.double(), stride)
        expected[one], products = gradient_reference.row_gradient(*part)
        report.check(f"timed row_gradient scores {name} {k}", got[1][:, k : k + 1], products, torch.float32)
    report.check(f"timed row_gradient table {name}", got[0], expected, table.dtype)


def bag_backward(
    table: Tensor, row_ids: Tensor, scores: Tensor, grad: Tensor, device: str, seconds: float
) -> float | None:
    """Return the time of F.embedding_bag's backward, None if it does not fit the device's memory."""
    leaves = (table.clone().requires_grad_(), scores.clone().requires_grad_())
    try:
        out = F.embedding_bag(row_ids, leaves[0], mode="sum", per_sample_weights=leaves[1])
        return median_ms(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), device, seconds)
    except torch.OutOfMemoryError:
        return None


def add_time(
    report: Report,
    name: str,
    dtype: torch.dtype,
    part: str,
    ours: float,
    bag: float | None,
    num_bytes: int,
    bandwidth: float,
) -> None:
    """Record and print one line of the table."""
    rate = num_bytes / ours * 1e3
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    line = {"shape": name, "rows": kind, "part": part, "ms": ours, "embedding_bag_ms": bag, "bytes_per_s": rate}
    report.times.append({**line, "share_of_copy": rate / bandwidth})
    other = f"{bag:9.3f}{bag / ours:7.2f}" if bag is not None else f"{'-':>9}{'-':>7}"
    print(f"{name:<16}{kind:<6}{part:<10}{ours:9.3f}{other}{rate / 1e9:8.0f}{rate / bandwidth:9.2f}", flush=True)


def time_hashing(report: Report, device: str, seconds: float, bandwidth: float) -> None:
    """Time sign_hash forward and backward beside the plain torch of the reference."""
    print(f"\n{'activations':<16}{'':<16}{'ms':>9}{'torch ms':>9}{'ratio':>7}{'GB/s':>8}{'of copy':>9}")
    for num_tokens, dim in ((16384, 1024), (32768, 512)) if device == "cuda" else ((4096, 512), (4096, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(num_tokens, dim, device=device).to(dtype)
            name = f"{num_tokens} x {dim}"
            ours = device_ms(lambda: sign_hash(x, _BITS), device, seconds)
            plain = device_ms(lambda: hash_reference.sign_hash(x, _BITS, "paper", 1.0), device, seconds)
            add_time(report, name, dtype, "hash", ours, plain, x.nbytes + num_tokens * dim // _BITS * 5, bandwidth)
            grad = torch.randn(num_tokens, dim // _BITS, device=device)
            ours = device_ms(lambda: torch.ops.mfdist.sign_hash_gradient(x, grad, _BITS, "paper", 1.0), device, seconds)
            plain = device_ms(
                lambda: hash_reference.sign_hash_gradient(x, grad, _BITS, "paper", 1.0),
                device,
                seconds,
            )
            add_time(report, name, dtype, "gradient", ours, plain, 2 * x.nbytes + grad.nbytes, bandwidth)


def main() -> int:
    """Check, then time; return 1 if any result is wrong, and time nothing then."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each timing")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    arguments = parser.parse_args()
    device: str = arguments.device
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    report = Report()
    check_lookups(report, device)
    check_hashing(report, device)
    worst = max(check.get("relative", 0.0) / check.get("tolerance", 1.0) for check in report.checks)
    print(f"{len(report.checks)} results compared with float64; the worst is at {worst:.2f} of its tolerance")
    bandwidth = None
    if report.is_right and not arguments.check_only:
        bandwidth = copy_bandwidth(device, arguments.seconds)
        print(f"copy of a large buffer: {bandwidth / 1e9:.0f} GB/s read and written")
        time_lookups(report, device, arguments.seconds, bandwidth)
        time_hashing(report, device, arguments.seconds, bandwidth)
    if arguments.json:
        found = {"machine": machine, "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
        arguments.json.write_text(
            json.dumps({**found, "checks": report.checks, "times": report.times}, indent=1) + "\n"
        )
    return 0 if report.is_right else 1


if __name__ == "__main__":
    sys.exit(main())

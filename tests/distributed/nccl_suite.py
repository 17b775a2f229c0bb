"""Sharded tables on the GPUs of this machine, over NCCL: one command, any number of GPUs; or CPUs, over gloo.

    python -m tests.distributed.nccl_suite                       # worlds 1, 2, 4, … up to all GPUs
    python -m tests.distributed.nccl_suite --device cpu --world 1,2,4

It runs, for each world size: many messages of all sizes between ranks that are late in turn; the conformance suite of
every table for every kind of sharding; training twice, for the same bytes; training under torchrun, saved midway and
resumed on half the ranks; `mfdist launch` with as many trainers, step by step beside torchrun; training over two hosts,
made of network namespaces, step by step beside one; a comparison of each kind with one table on one device; the fullest
moment of a rank's memory, against its share of the table and what the plan announced; plain all-to-alls of many sizes;
a table larger than one GPU's memory, where there are several; `mfdist bench plan`, predicted beside measured; and
`mfdist bench sharding`. What fails is told and the rest goes on; the exit code is 1 then. What cannot run here
(`launch` without Ray, `hosts` without root) is told and named at the end. `--collectives` leaves all exchanges of
tables to them, which else go by memory where ranks reach each other's. `--only` and `--kind` run some parts and kinds,
in the order they are named in; `--stage-seconds` ends a stage that hangs; `--json` writes everything found, after every
stage.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from importlib import util
from pathlib import Path

import torch

from mfdist.benchmarks import plan_choice
from mfdist.benchmarks.sharding import DERIVED, chosen, compare
from mfdist.testing.run_ranks import RankPool
from tests.distributed import suite_ranks
from tests.distributed.hosts import why_not
from tests.distributed.suite_training import (
    launched_and_trained,
    launched_over_hosts,
    repeated,
    resumed_on_fewer,
    trained_over_hosts,
)

PARTS = (
    "exchange",
    "conformance",
    "repeat",
    "train",
    "launch",
    "hosts",
    "equality",
    "memory",
    "links",
    "large",
    "plan",
    "bench",
)
MEMORY_KINDS = ("row_wise", "pooled_rows", "column_wise", "table_wise", "grid", "slot_grid")
SUMS = ("column_wise", "table_wise")
#: Of all GPUs' memory, what the table that one of them cannot hold takes.
_LARGE_SHARE = 0.7
#: Largest relative distance of a loss after resuming from that of the run that went on, in fp32.
_LOSS_TOLERANCE = 1e-3
_NO_RAY = "Ray is not installed here; pip install 'mfdist[ray]'"


class Suite:
    """Runs parts one after the other, and keeps what was found and what failed."""

    def __init__(self, device: str, peers: bool, until_s: float, stage_s: float, path: Path | None) -> None:
        self.device, self.peers, self.until_s, self.stage_s, self.path = device, peers, until_s, stage_s, path
        self.found: dict[str, list[dict[str, object]]] = {part: [] for part in PARTS}
        self.failed: list[str] = []
        self.late: list[str] = []
        self.skipped: list[str] = []

    def tell(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def attempt(self, what, function):
        """Return what a part gives, or None where it fails or there is no time left for it."""
        if time.monotonic() > self.until_s:
            self.late.append(what)
            self.save()
            return None
        began = time.monotonic()
        try:
            result = function()
        except Exception:  # noqa: BLE001 - whatever fails is told, and the rest goes on
            self.fail(what)
            self.tell(f"FAILED {what} ({time.monotonic() - began:.1f} s)\n{traceback.format_exc()[-3000:]}")
            return None
        self.tell(f"ok     {what} ({time.monotonic() - began:.1f} s)")
        return result

    def fail(self, what: str) -> None:
        self.failed.append(what)
        self.save()

    def save(self) -> None:
        """Write what was found so far; a reader sees the last whole document."""
        if self.path is None:
            return
        document = {"found": self.found, "failed": self.failed, "not_begun": self.late, "skipped": self.skipped}
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        unfinished.replace(self.path)

    def links(self, world_size: int, options: argparse.Namespace) -> None:
        if world_size == 1:
            return
        with self._pool() as pool:
            ranks = self._on_ranks(pool, f"links {world_size}", suite_ranks.links, world_size)
        for num_bytes, seconds in (ranks[0] if ranks else {}).items():
            self._keep("links", world_size, bytes_to_each=num_bytes, seconds=seconds)
            rate = num_bytes * (world_size - 1) / seconds / 1e9
            self.tell(f"         {num_bytes:>10} bytes to each: {seconds * 1e6:.1f} us, {rate:.2f} GB/s a rank")

    def exchange(self, world_size: int, options: argparse.Namespace) -> None:
        with self._pool() as pool:
            ranks = self._on_ranks(pool, f"exchange {world_size}", suite_ranks.exchanged, world_size)
        if ranks:
            wrong, by_peers = sum(each[0] for each in ranks), ranks[0][1]
            self._keep("exchange", world_size, wrong=wrong, by_peers=by_peers)
            if wrong:
                self.fail(f"exchange {world_size}: {wrong} elements wrong")
            if by_peers != (self.peers and world_size > 1):
                self.fail(f"exchange {world_size}: not by {'peer memory' if self.peers else 'collectives'}")
            self.tell(f"         {wrong} elements wrong, {'by peer memory' if by_peers else 'by collectives'}")

    def conformance(self, world_size: int, options: argparse.Namespace) -> None:
        with self._pool() as pool:
            for kind in self._kinds(world_size, options):
                names = self._on_ranks(
                    pool, f"conformance {world_size} {kind}", suite_ranks.conformance, world_size, kind
                )
                if names:
                    self._keep("conformance", world_size, kind=kind, cases=len(names[0]))

    def equality(self, world_size: int, options: argparse.Namespace) -> None:
        with self._pool() as pool:
            for kind in self._kinds(world_size, options):
                told = self._on_ranks(pool, f"equality {world_size} {kind}", suite_ranks.equality, world_size, kind)
                if told:
                    distance, is_exact = max(each[0] for each in told), all(each[1] for each in told)
                    self._keep("equality", world_size, kind=kind, distance=distance, same_bits=is_exact)
                    self.tell(f"         {distance:.1e} off, {'the same bits' if is_exact else 'other bits'}")

    def memory(self, world_size: int, options: argparse.Namespace) -> None:
        with self._pool() as pool:
            for kind in self._kinds(world_size, options):
                if kind not in MEMORY_KINDS or (world_size == 1 and kind not in SUMS):
                    continue  # one rank's plan announces no exchange, though rows are copied all the same
                ranks = self._on_ranks(pool, f"memory {world_size} {kind}", suite_ranks.peak_memory, world_size, kind)
                for rank, each in enumerate(ranks or ()):
                    most = each["allowed"] + each["announced"]
                    self._keep("memory", world_size, kind=kind, rank=rank, **each)
                    if each["peak"] > most:
                        self.fail(f"memory {world_size} {kind} rank {rank}")
                    self.tell(
                        f"         rank {rank}: {each['peak'] / 1e9:.3f} GB at the fullest, {most / 1e9:.3f} allowed; "
                        f"rows and states {each['held'] / 1e9:.3f}, announced buffers {each['announced'] / 1e9:.3f}"
                    )

    def large(self, world_size: int, options: argparse.Namespace) -> None:
        if self.device != "cuda" or world_size == 1:
            return
        num_bytes = int(torch.cuda.get_device_properties(0).total_memory * world_size * _LARGE_SHARE)
        with self._pool() as pool:
            what = f"large {world_size}: {num_bytes / 1e9:.0f} GB"
            function = suite_ranks.larger_than_one
            held = self._on_ranks(pool, what, function, world_size, num_bytes)
            if held:
                self._keep("large", world_size, num_bytes=sum(held))

    def repeat(self, world_size: int, options: argparse.Namespace) -> None:
        found = self._train(what := f"repeat {world_size}", repeated, world_size, options)
        if found is None:
            return
        num_files, differing = found
        self._keep("repeat", world_size, num_files=num_files, differing=differing)
        if differing:
            self.fail(f"{what}: {', '.join(differing[:3])}")
        self.tell(f"         {len(differing)} of {num_files} files of the last checkpoint differ")

    def train(self, world_size: int, options: argparse.Namespace) -> None:
        runs = self._train(what := f"train {world_size}", resumed_on_fewer, world_size, options)
        self._compare("train", what, world_size, ("many", "fewer"), runs, _LOSS_TOLERANCE)

    def launch(self, world_size: int, options: argparse.Namespace) -> None:
        if self._can(what := f"launch {world_size}", None if util.find_spec("ray") else _NO_RAY):
            runs = self._train(what, launched_and_trained, world_size, options)
            self._compare("launch", what, world_size, ("launched", "trained"), runs, tolerance=0.0)

    def hosts(self, world_size: int, options: argparse.Namespace) -> None:
        if world_size % 2:
            return
        if not self._can(what := f"hosts {world_size}", why_not()):
            return
        runs = self._train(what, trained_over_hosts, world_size, options)
        self._compare("hosts", what, world_size, ("apart", "together"), runs, _LOSS_TOLERANCE)
        if self._can(what := f"hosts {world_size} launched", None if util.find_spec("ray") else _NO_RAY):
            runs = self._train(what, launched_over_hosts, world_size, options)
            self._compare("hosts", what, world_size, ("launched", "together"), runs, _LOSS_TOLERANCE)

    def plan(self, world_size: int, options: argparse.Namespace) -> None:
        if world_size == 1:
            return
        cases = plan_choice.chosen_cases(self.device, ())
        compared = plan_choice.compare(self.device, [world_size], cases, timeout_s=self.stage_s)
        topology = self.attempt(f"plan {world_size} calibration", lambda: next(compared))
        for case in cases if topology is not None else ():
            choice = self.attempt(f"plan {world_size} {case.name}", lambda: next(compared))
            if choice is None:  # after a failure nothing more comes
                return
            self._keep("plan", topology=asdict(topology), loss=choice.loss, **asdict(choice))
            self.tell(f"         {choice.case}: chose {choice.chosen}, {choice.loss:.0%} slower than the fastest")
            for kind, measured_s in choice.measured_s.items():
                ratio = choice.predicted_s[kind] / measured_s
                self.tell(f"           {kind}: {measured_s * 1e3:.2f} ms, predicted {ratio:.2f} of it")

    def bench(self, world_size: int, options: argparse.Namespace) -> None:
        cases, contenders = chosen(self.device, options.case or (), options.contender or ())
        for case in cases:
            asked = {"seconds": options.seconds, "timeout_s": self.stage_s}
            compared = compare(self.device, [world_size], [case], contenders, **asked)
            for result in (
                self.attempt(f"bench {world_size} {case.name}", lambda compared=compared: list(compared)) or ()
            ):
                derived = {name: getattr(result, name) for name in DERIVED}
                self.found["bench"].append({**asdict(result), **derived})
                if result.is_wrong:
                    self.fail(f"bench {world_size} {case.name} {result.contender}")
                self.tell(_bench_line(result))
            self.save()

    def _can(self, what: str, reason: str | None) -> bool:
        """Return whether a part can run here, which is where there is no reason why not; else tell it."""
        if reason is not None:
            self.skipped.append(what)
            self.save()
            self.tell(f"skipped {what}: {reason}")
        return reason is None

    def _train(self, what, function, world_size, options):
        with tempfile.TemporaryDirectory(prefix="mfdist-suite-") as folder:
            asked = (self.device, world_size, Path(folder), self.stage_s / 2, options.preset, options.set)
            return self.attempt(what, lambda: function(*asked))

    def _compare(self, part, what, world_size, names, runs, tolerance):
        """Keep the events of two runs, step by step; a loss that is further from the other's than that is a failure."""
        for one, other in zip(*runs, strict=True) if runs else ():
            distance = abs(one["loss"] - other["loss"]) / one["loss"]
            self._keep(part, world_size, **dict(zip(names, (one, other), strict=True)), distance=distance)
            if not distance <= tolerance:
                self.fail(f"{what} step {one['step']}")
            self.tell(
                f"         step {one['step']}: loss {one['loss']:.6f} {names[0]}, {other['loss']:.6f} {names[1]}, "
                f"{distance:.1e} off; {one['tokens_per_s']:.0f} and {other['tokens_per_s']:.0f} tokens/s"
            )

    def _pool(self) -> RankPool:
        return RankPool()

    def _kinds(self, world_size: int, options: argparse.Namespace) -> list[str]:
        known = suite_ranks.kinds_for(world_size)
        return [kind for kind in options.kind or known if kind in known]

    def _on_ranks(self, pool, what, function, world_size, *arguments):
        arguments = (*arguments, self.device, self.peers)
        backend = "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"
        limits = {"timeout_s": self.stage_s, "backend": backend}
        return self.attempt(what, lambda: pool.run(function, world_size, *arguments, **limits))

    def _keep(self, part: str, world_size: int, **values: object) -> None:
        self.found[part].append({**values, "world_size": world_size})
        self.save()


def _bench_line(result) -> str:
    if result.step_s is None:
        return f"         {result.contender}: {result.note}"
    line = f"         {result.contender}: forward {result.forward_s * 1e3:.2f} ms, step {result.step_s * 1e3:.2f} ms, "
    line += f"in a row {result.in_a_row_s * 1e3:.2f} ms, {result.tokens_per_s:.3g} tokens/s"
    if result.sent_bytes is not None:
        line += f", {result.sent_bytes / 1e6:.1f} MB sent, {result.share_of_plain or 0:.2f} of a plain all-to-all"
        line += f" ({(result.sent_bytes / result.plain_s if result.plain_s else 0) / 1e9:.1f} GB/s)"
    if result.overlap is not None:
        line += f", {result.overlap:.0%} of it hidden by computing"
    return line if result.peak_bytes is None else f"{line}, peak {result.peak_bytes / 1e9:.2f} GB"


def _worlds(text: str | None, device: str) -> list[int]:
    if text is not None:
        return [int(part) for part in text.split(",")]
    most = torch.cuda.device_count() if device == "cuda" else 4
    return [size for size in (1, 2, 4, 8, 16) if size <= most]


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--world", metavar="N,N,…", help="world sizes; by default 1, 2, 4, … up to all GPUs")
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part; may be repeated")
    parser.add_argument("--kind", action="append", help="of sharding, in conformance, equality and memory")
    parser.add_argument(
        "--collectives", action="store_true", help="in these parts nothing goes by memory of the others"
    )
    parser.add_argument("--case", action="append", help="pattern of the benchmark's cases")
    parser.add_argument("--contender", action="append", help="pattern of the benchmark's contenders")
    parser.add_argument("--preset", help="what to train; by default a small one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of what is trained")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the benchmark, each contender and case")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing new after so long")
    parser.add_argument("--stage-seconds", type=float, default=300.0, help="end a stage that takes so long; it failed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found")
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast off
    until_s = time.monotonic() + 60 * options.minutes
    suite = Suite(options.device, not options.collectives, until_s, options.stage_seconds, options.json)
    for world_size in _worlds(options.world, options.device):
        for part in options.only or PARTS:
            getattr(suite, part)(world_size, options)
    suite.save()
    told = f"{len(suite.failed)} failed: {', '.join(suite.failed)}" if suite.failed else "all passed"
    told += f"; skipped: {', '.join(suite.skipped)}" if suite.skipped else ""
    suite.tell(f"{told}; not begun for want of time: {', '.join(suite.late) or 'nothing'}")
    return int(bool(suite.failed))


if __name__ == "__main__":
    sys.exit(main())

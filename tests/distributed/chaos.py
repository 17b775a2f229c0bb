"""Blows that strike a launched training at random, and what each of them costs.

    with Hosts(3) as hosts, RayNodes(hosts, cpus=1) as nodes:
        chaos = Chaos(hosts, nodes, seed=1)
        chaos.train(folder, steps=200)       # to the end, whatever happens
        for blow in chaos.blows: ...

Which blow comes next, on whom and after how many steps, follows from the seed; how long it lasts too.
"""

import contextlib
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdist.launch.job import JobFiles
from mfdist.training.metrics import read_metrics
from tests.distributed.hosts import Hosts
from tests.distributed.loopback_hosts import LoopbackHosts
from tests.distributed.ray_nodes import RayNodes

#: Kinds of blows. A partition is longer than the head believes in a silent host; what hangs is stopped, not dead.
KINDS = ("trainer", "server", "host", "cut", "slow", "partition", "hang")
#: Steps of training between the last blow's end and the next blow.
_GAP_STEPS = (6, 14)
_MOST_LOST_S = 180.0


@dataclass
class Blow:
    """Something bad that happened to a training.

    Args:
        kind: one of `KINDS`.
        target: what it struck.
        step: the last step before it.
        lost_s: from the blow to the first step that had not been done before it.
        groups: groups of trainers that were formed meanwhile; 0: training rode it out.
    """

    kind: str
    target: str
    step: int
    lost_s: float = 0.0
    groups: int = 0


class Chaos:
    """Strikes one training after another, in one cluster.

    Args:
        hosts, nodes: the cluster's; the head's host itself is left alone. Those of loopback have no link to strike.
        seed: of all that is random.
        kinds: of the blows; each comes once before one comes again.
    """

    def __init__(
        self, hosts: Hosts | LoopbackHosts, nodes: RayNodes, *, seed: int, kinds: Sequence[str] = KINDS
    ) -> None:
        self.blows: list[Blow] = []
        self._hosts, self._nodes = list(hosts), nodes
        self._random = random.Random(seed)
        self._kinds = tuple(kinds)
        self._next: list[str] = []

    def train(self, config: Path, run: Path, *arguments: str, deadline_s: float, num_blows: int = 1000) -> None:
        """Launch a run from host0, and strike until it is finished.

        Args:
            config: of the run.
            run: the folder to make.
            arguments: of `mfdist launch` beside these.
            deadline_s: for all of it.
            num_blows: at most.

        Raises:
            AssertionError: it ended otherwise, or was not through in time; with what it said.
        """
        command = ["launch", str(config), "--out", str(run), "--address", self._nodes.address, "--quiet", *arguments]
        log = run.with_suffix(".log")
        until = time.monotonic() + deadline_s
        files = JobFiles(run)
        with log.open("wb") as file:
            process = self._hosts[0].start(
                [sys.executable, "-m", "mfdist", *command], env=self._nodes.environment, stdout=file, stderr=file
            )

        def goes_on() -> bool:
            """Return whether the job still runs, and let nodes come back meanwhile."""
            self._nodes.revive()
            assert time.monotonic() < until, f"it was not through in {deadline_s} s: {_said(files, log)}"
            time.sleep(0.05)
            return process.poll() is None

        due = self._random.randint(*_GAP_STEPS)
        while goes_on():
            if len(self.blows) < num_blows and _last_step(run) >= due and _is_whole(files):
                blow = self._strike(files, goes_on)
                due = max(_last_step(run), blow.step) + self._random.randint(*_GAP_STEPS)
        assert process.returncode == 0, f"it ended with {process.returncode}: {_said(files, log)}"

    def report(self) -> str:
        """Return what the blows cost, a line each and then by kind."""
        lines = [
            f"step {blow.step:4} {blow.kind:9} {blow.target:24} {blow.lost_s:6.1f} s, {blow.groups} groups"
            for blow in self.blows
        ]
        for kind in self._kinds:
            lost = [blow.lost_s for blow in self.blows if blow.kind == kind]
            if lost:
                median, worst = statistics.median(lost), max(lost)
                lines.append(f"{kind:9} {len(lost):2} blows, lost: median {median:5.1f} s, worst {worst:5.1f} s")
        return "\n".join(lines)

    def _strike(self, files: JobFiles, goes_on: Callable[[], bool]) -> Blow:
        if not self._next:
            self._next = self._random.sample(self._kinds, len(self._kinds))
        kind = self._next.pop()
        step, state = _last_step(files.run), files.read_state()
        began = time.monotonic()
        with contextlib.ExitStack() as lasting:
            target, lasts_s = self._begin(kind, state, lasting)
            blow = Blow(kind, target, step)
            self.blows.append(blow)
            is_over = False
            while goes_on():
                now = time.monotonic()
                if not is_over and now - began > lasts_s:
                    lasting.close()
                    is_over = True
                if not blow.lost_s and _last_step(files.run) > step:
                    blow.lost_s = now - began
                if blow.lost_s and (is_over or lasts_s == math.inf):
                    break
                assert now - began < _MOST_LOST_S, f"{blow} is not over after {now - began:.0f} s: {_said(files)}"
        blow.groups = files.read_state().get("groups", 0) - state["groups"]
        return blow

    def _begin(self, kind: str, state: dict[str, Any], lasting: contextlib.ExitStack) -> tuple[str, float]:
        """Strike; return whom, and for how many seconds that lasts, infinity for as long as training stands still."""
        draw = self._random
        if kind in ("trainer", "server", "hang"):
            role = kind if kind != "hang" else draw.choice(("trainer", "server"))
            actor = draw.choice([each for each in state["actors"] if each["name"].startswith(role)])
            number = signal.SIGSTOP if kind == "hang" else signal.SIGKILL
            os.kill(actor["pid"], number)
            if kind == "hang":
                lasting.callback(_kill_if_there, actor["pid"])
            return f"{actor['name']} on {self._name(actor['host'])}", math.inf if kind == "hang" else 0.0
        if kind == "host":
            busy = {actor["host"] for actor in state["actors"]}
            host = draw.choice([host for host in self._hosts[1:] if host.address in busy])
            self._nodes.lose(host.index)
            lasting.callback(self._nodes.start, host.index)
            return host.name, draw.uniform(1, 4)
        host = draw.choice(self._hosts[1:])
        if kind == "slow":
            speed = draw.choice((64, 256))
            means = lasting.enter_context(host.slowed(speed))
            seconds = draw.uniform(3, 6)
            return f"{host.name}, {speed} KiB/s ({means}), {seconds:.1f} s", seconds
        seconds = draw.uniform(1, 4) if kind == "cut" else draw.uniform(10, 15)
        lasting.enter_context(host.cut())
        return f"{host.name} for {seconds:.1f} s", seconds

    def _name(self, address: str) -> str:
        return next((host.name for host in self._hosts if host.address == address), address)


def _is_whole(files: JobFiles) -> bool:
    """Return whether all actors are at work, so that a blow has someone to strike."""
    actors = files.read_state().get("actors") or [{}]
    return all(actor.get("pid") and actor["state"] in ("training", "serving") for actor in actors)


def _last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path, "stepped")), default=0) if path.exists() else 0


def _kill_if_there(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _said(files: JobFiles, log: Path | None = None) -> str:
    log = log or files.run.with_suffix(".log")
    return f"{log.read_text('utf-8', errors='replace')[-4000:]}\n{files.read_state()}"

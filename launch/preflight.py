"""Whether the hosts of a running cluster can train a run together, found out before anything of it starts.

What they offer, in CPUs, GPUs and memory, is judged by `start.fit` and `cluster_plan.plan_job`. A cluster that mfdist
itself starts is one machine with one installation, and needs none of this.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mfdist.config import RunConfig
from mfdist.errors import ConfigError
from mfdist.launch import cluster
from mfdist.launch.host_facts import HostFacts, look
from mfdist.launch.machine import REQUIRED, existing_parent

_LOOK_S = 120.0  # a host may first have to be sent the code
#: What table servers need besides, and trainers that use them.
_TO_SERVE = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf", "prometheus-client", "cryptography")
#: Certificates are made for now, and logs of hosts are read side by side.
_MOST_SKEW_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A look at a host.

    Args:
        address: the host's.
        facts: what was found; None: it could not look.
        failure: why.
        asked_s, answered_s: on this host's clock, in seconds since the epoch.
    """

    address: str
    facts: HostFacts | None = None
    failure: str = ""
    asked_s: float = 0.0
    answered_s: float = 0.0

    @property
    def skew_s(self) -> float:
        """Return by how much its clock differs from this host's, at least."""
        if self.facts is None:
            return 0.0
        return max(0.0, self.facts["clock_s"] - self.answered_s, self.asked_s - self.facts["clock_s"])


def check_hosts(config: RunConfig, run: Path) -> None:
    """Look at all hosts of the joined cluster, and refuse those that cannot train a run with this one.

    Args:
        config: of the run.
        run: its folder, which may not be there yet.

    Raises:
        ConfigError: with everything that is wrong and its remedy, hosts of one problem together.
    """
    folder = existing_parent(run)
    with _probe(folder) as probe:
        paths = [str(probe), *(str(path) for path in _shared_paths(config))]
        asked = (str(folder), paths, [*REQUIRED, *(_TO_SERVE if config.launch.servers else ())])
        here = look(*asked)
        began = time.time()
        found = [
            Looked(address=host.address, asked_s=began, answered_s=time.time(), facts=facts, failure=failure)
            for host, facts, failure in cluster.ask_hosts(look, *asked, timeout_s=_LOOK_S)
        ]
    wrong = problems(found, here, probe=str(probe), run=run)
    if wrong:
        raise ConfigError("; also: ".join(wrong))


def problems(found: Sequence[Looked], here: HostFacts, *, probe: str, run: Path) -> list[str]:
    """Return what is wrong, a sentence for each kind of problem, with the hosts that have it and the remedy.

    Args:
        found: by host.
        here: of the host that starts the run, which the others must be like.
        probe: the path that stands for the run's folder.
        run: that folder.
    """
    wrong: list[str] = []

    def judge(must: str, said: Callable[[Looked], str], remedy: str) -> None:
        hosts = _listed([(looked.address, words) for looked in found if (words := said(looked))])
        if hosts:
            wrong.append(f"{must}; {hosts}; {remedy}")

    def differs(
        name: Literal["python", "ray", "torch", "mfdist"], kept: Callable[[str], str] = str
    ) -> Callable[[Looked], str]:
        def said(looked: Looked) -> str:
            its = "" if looked.facts is None else looked.facts[name]
            return its if its and kept(its) != kept(here[name]) else ""

        return said

    def lacks(which: Callable[[HostFacts], Sequence[str]], words: str) -> Callable[[Looked], str]:
        def said(looked: Looked) -> str:
            lacking = [] if looked.facts is None else which(looked.facts)
            return f"{words} {', '.join(lacking)}" if lacking else ""

        return said

    ray, python, torch = here["ray"], _minor(here["python"]), _release(here["torch"])
    judge(
        "every host must be able to run this mfdist",
        lambda looked: looked.failure,
        "see the logs of Ray there, or take the host out of the cluster",
    )
    judge(
        f"every host must run Ray {ray}, as this one does",
        differs("ray"),
        f"pip install 'ray=={ray}' there, and start its node again",
    )
    judge(
        f"every host must run Python {python}, as this one does",
        differs("python", _minor),
        f"start its Ray node from an environment with Python {python}",
    )
    judge(
        "every host must have what mfdist needs",
        lacks(lambda facts: facts["missing"], "without"),
        "pip install 'mfdist[ray]' there",
    )
    judge(
        f"every host must run the mfdist of this one, whose sources have the digest {here['mfdist']}",
        differs("mfdist"),
        "take away the one that is installed there, for launch sends its own",
    )
    judge(
        f"every host must have torch {torch}, as this one does",
        differs("torch", _release),
        f"pip install 'torch=={torch}' there",
    )
    judge(
        f"every host must see the run's folder, {run}",
        lacks(lambda facts: [str(run)] if probe in facts["unseen"] else [], "without"),
        "name one on storage that all hosts share, by --out",
    )
    judge(
        f"every host must be allowed to write in {run.parent}",
        lambda looked: "may not" if looked.facts is not None and not looked.facts["may_write"] else "",
        "start Ray as the same user everywhere",
    )
    judge(
        "every host must see the files that the configuration names",
        lacks(lambda facts: [path for path in facts["unseen"] if path != probe], "without"),
        "put them on storage that all hosts share",
    )
    judge(
        f"clocks must agree with this host's to {_MOST_SKEW_S / 60:.0f} minutes",
        lambda looked: f"{looked.skew_s / 60:.0f} minutes apart" if looked.skew_s > _MOST_SKEW_S else "",
        "let NTP set them, as by timedatectl set-ntp true",
    )
    return wrong


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """Write a file that hosts look for."""
    try:
        handle, name = tempfile.mkstemp(prefix=".mfdist-launch-", dir=folder)
    except OSError as error:
        raise ConfigError(
            f"the run's folder must be one that can be written; {folder}: {error.strerror}; name another by --out"
        ) from None
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _shared_paths(config: RunConfig) -> Iterator[Path]:
    """Yield the files and folders of a configuration that are on this host, and must be on all."""
    named = [Path(config.data.source).expanduser(), Path(config.data.tokenizer), config.sharding.plan]
    yield from (path.absolute() for path in named if path is not None and path.exists())


def _listed(said: Sequence[tuple[str, str]]) -> str:
    """Return hosts and what is said of them; those of which the same is said together."""
    together: dict[str, list[str]] = {}
    for address, words in said:
        together.setdefault(words, []).append(address)
    return "; ".join(f"{', '.join(addresses)}: {words}" for words, addresses in together.items())


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _release(version: str) -> str:
    return version.partition("+")[0]

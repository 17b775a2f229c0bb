"""What keeps hosts from training together is said before training begins, with the remedy."""

import time
from pathlib import Path
from typing import Any

import pytest

from mfdist.launch.host_facts import HostFacts, _digest, look
from mfdist.launch.machine import REQUIRED
from mfdist.launch.preflight import Looked, problems

HERE = HostFacts(
    python="3.11.7",
    ray="2.60.0",
    torch="2.13.0+cpu",
    mfdist="0123abcd",
    missing=[],
    unseen=[],
    may_write=True,
    clock_s=1000.0,
)
PROBE = "/shared/.probe"
RUN = Path("/shared/runs/mine")


def found(address: str = "10.0.0.2", *, late_s: float = 1.0, **changes: Any) -> Looked:
    """Return a look at a host that is like this one but for `changes`."""
    facts = HostFacts(**{**HERE, **changes})
    return Looked(address=address, facts=facts, asked_s=1000.0, answered_s=1000.0 + late_s)


def judged(*looked: Looked) -> list[str]:
    return problems(looked, HERE, probe=PROBE, run=RUN)


def test_hosts_that_are_alike_have_no_problem() -> None:
    assert judged(found("10.0.0.1"), found("10.0.0.2", python="3.11.9", torch="2.13.0+cu130", clock_s=1000.4)) == []


@pytest.mark.parametrize(
    ("changes", "says", "remedy"),
    [
        ({"ray": "2.58.0"}, "must run Ray 2.60.0, as this one does; 10.0.0.2: 2.58.0;", "pip install 'ray==2.60.0'"),
        ({"python": "3.12.1"}, "must run Python 3.11, as this one does; 10.0.0.2: 3.12.1;", "environment with Python"),
        ({"missing": ["torch", "grpcio"]}, "10.0.0.2: without torch, grpcio;", "pip install 'mfdist[ray]' there"),
        ({"mfdist": "89abcdef"}, "sources have the digest 0123abcd; 10.0.0.2: 89abcdef;", "launch sends its own"),
        ({"torch": "2.12.1"}, "must have torch 2.13.0, as this one does; 10.0.0.2: 2.12.1;", "'torch==2.13.0'"),
        ({"unseen": [PROBE]}, "10.0.0.2: without /shared/runs/mine;", "storage that all hosts share, by --out"),
        ({"unseen": ["/data/x"]}, "that the configuration names; 10.0.0.2: without /data/x;", "all hosts share"),
        ({"may_write": False}, "be allowed to write in /shared/runs; 10.0.0.2: may not;", "as the same user"),
        ({"clock_s": 4600.0}, "to 5 minutes; 10.0.0.2: 60 minutes apart;", "NTP"),
        ({"clock_s": -2600.0}, "to 5 minutes; 10.0.0.2: 60 minutes apart;", "NTP"),
    ],
)
def test_each_problem_is_said_with_its_host_and_its_remedy(changes: dict[str, Any], says: str, remedy: str) -> None:
    (sentence,) = judged(found("10.0.0.1"), found(**changes))
    assert says in sentence
    assert remedy in sentence.rpartition(";")[2]
    assert "\n" not in sentence


def test_a_host_that_cannot_look_is_a_problem() -> None:
    (sentence,) = judged(found("10.0.0.1"), Looked(address="10.0.0.2", failure="its host is gone"))
    assert "10.0.0.2: its host is gone;" in sentence


def test_hosts_of_one_problem_are_named_together_and_problems_one_after_another() -> None:
    ray, clock = judged(
        found("10.0.0.1", ray="2.58.0"),
        found("10.0.0.2", ray="2.58.0", clock_s=9000.0),
        found("10.0.0.3", ray="2.59.1"),
    )
    assert "10.0.0.1, 10.0.0.2: 2.58.0; 10.0.0.3: 2.59.1;" in ray
    assert "10.0.0.2: 133 minutes apart" in clock


def test_a_slow_answer_is_not_taken_for_a_wrong_clock() -> None:
    assert judged(found(late_s=7200.0, clock_s=4600.0)) == []


def test_a_host_looks_at_itself(tmp_path: Path) -> None:
    before = time.time()
    facts = look(str(tmp_path), [str(tmp_path), str(tmp_path / "absent")], [*REQUIRED, "no-such-distribution"])
    assert facts["unseen"] == [str(tmp_path / "absent")]
    assert facts["missing"] == ["no-such-distribution"]
    assert facts["may_write"]
    assert facts["torch"]
    assert before <= facts["clock_s"] <= time.time()
    assert len(facts["mfdist"]) == 8


def test_a_digest_is_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mfdist_of_another"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    digests = {_digest(package.name)}
    (package / "part" / "one.py").write_text("x = 1")
    digests.add(_digest(package.name))
    (package / "part" / "one.py").write_text("x = 2")
    digests.add(_digest(package.name))
    (package / "part" / "one.pyc").write_bytes(b"compiled")
    digests.add(_digest(package.name))
    assert len(digests) == 3
    assert _digest("no_such_package") == ""

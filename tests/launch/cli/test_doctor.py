"""`mfdist doctor` on this machine, and where something is wrong."""

import json

NAMES = [
    "packages", "memory", "disk", "disk speed", "cache", "cpu kernels", "checkpoint", "file locks", "gpu",
    "loopback", "gloo", "shared memory", "clock",
]  # fmt: skip


def test_json_tells_every_check_and_the_machine(mfdist, workplace):
    code, out, _ = mfdist("doctor", "--json")
    document = json.loads(out)
    assert code == (0 if document["ok"] else 1)
    names = [check["name"] for check in document["checks"]]
    assert [name for name in names if name not in ("gpu kernels", "nccl")] == NAMES
    failed = [check for check in document["checks"] if check["is_essential"] and not check["ok"]]
    assert failed == []
    assert document["versions"]["torch"]
    assert document["machine"]["cpu"]["usable_cores"] >= 1
    assert document["machine"]["disk"]["runs"]["free_bytes"] > 0
    assert not list(workplace.glob(".mfdist-doctor-*"))


def test_a_folder_that_cannot_hold_runs_fails_with_a_remedy(mfdist):
    code, out, _ = mfdist("doctor", "--at", "/proc/self", "--json")
    assert code == 1
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert not checks["checkpoint"]["ok"]
    assert "--at" in checks["checkpoint"]["remedy"]
    assert checks["cpu kernels"]["ok"]


def test_people_get_a_line_for_each_check(mfdist):
    _, out, _ = mfdist("doctor")
    assert all(f"{name}: " in out for name in NAMES)
    assert "versions: python" in out
    assert "\x1b" not in out

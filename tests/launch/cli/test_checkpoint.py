"""`mfdist checkpoint` on real steps, whole and damaged."""

import json
import shutil


def test_list_tells_the_kept_steps(mfdist, finished):
    run_dir, _, _ = finished
    code, out, err = mfdist("checkpoint", "list", run_dir, "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)["checkpoints"]
    assert [step["step"] for step in listed] == [10, 12]
    assert all(step["num_bytes"] > 0 and step["created"] for step in listed)
    assert listed[-1]["path"].endswith("step-000000012")

    lines = mfdist("checkpoint", "list", run_dir)[1].splitlines()
    assert [line.split()[1] for line in lines] == ["10", "12"]


def test_whole_steps_verify(mfdist, finished):
    run_dir, _, _ = finished
    assert mfdist("checkpoint", "verify", run_dir)[0] == 0
    code, out, err = mfdist("checkpoint", "verify", run_dir / "checkpoints" / "step-000000010", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["ok"] is True
    assert [(step["step"], step["damages"]) for step in document["checkpoints"]] == [(10, [])]


def test_a_damaged_step_fails_and_is_named(mfdist, finished, tmp_path):
    run_dir = tmp_path / "damaged"
    shutil.copytree(finished[0], run_dir)
    chunk = max((run_dir / "checkpoints" / "step-000000012").rglob("c.*"), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)

    code, out, _ = mfdist("checkpoint", "verify", run_dir)
    assert code == 1
    assert "step 10: whole" in out
    assert "step 12: DAMAGED" in out
    document = json.loads(mfdist("checkpoint", "verify", run_dir, "--json")[1])
    assert [step["ok"] for step in document["checkpoints"]] == [True, False]
    assert chunk.name in document["checkpoints"][1]["damages"][0]


def test_a_folder_that_is_no_run_is_misuse(mfdist, tmp_path):
    for verb in ("list", "verify"):
        code, out, err = mfdist("checkpoint", verb, tmp_path)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_run_without_steps_lists_nothing_and_cannot_be_verified(mfdist, finished, tmp_path):
    shutil.copy(finished[0] / "config.toml", tmp_path)
    assert json.loads(mfdist("checkpoint", "list", tmp_path, "--json")[1])["checkpoints"] == []
    assert mfdist("checkpoint", "verify", tmp_path)[0] == 1

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


def test_inspect_shows_arrays_and_attributes(mfdist, finished):
    run_dir = finished[0]
    code, out, err = mfdist("checkpoint", "inspect", run_dir, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["step"] == 12
    assert document["attributes"]["data"]["fingerprint"]
    tables = [array for array in document["arrays"] if array["table"]]
    assert {array["array"] for array in tables} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(len(array["shape"]) == 2 and array["dtype"] == "float32" and array["num_files"] for array in tables)
    text = mfdist("checkpoint", "inspect", run_dir / "checkpoints" / "step-000000010")[1]
    assert text.startswith("step 10: ")
    assert all(f"  {array['path']} " in text for array in document["arrays"])


def test_diff_tells_what_training_changed(mfdist, finished):
    steps = [finished[0] / "checkpoints" / f"step-0000000{number}" for number in (10, 12)]
    code, out, err = mfdist("checkpoint", "diff", *steps, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["is_same"] is False
    assert {difference["kind"] for difference in document["arrays"]} == {"values"}
    assert document["attributes"] == {}
    assert "rows 0 to " in mfdist("checkpoint", "diff", *steps)[1]
    assert mfdist("checkpoint", "diff", steps[0], steps[0])[1] == "the two hold the same\n"


def test_prune_deletes_and_says_what_stays(mfdist, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    code, out, _ = mfdist("checkpoint", "prune", run_dir, "--keep-last", "1", "--dry-run")
    assert (code, out) == (0, "would delete 1 of 2 steps; kept: 12\n")
    assert len(json.loads(mfdist("checkpoint", "list", run_dir, "--json")[1])["checkpoints"]) == 2
    kept_all = mfdist("checkpoint", "prune", run_dir, "--keep-last", "1", "--keep-every", "5", "--json")[1]
    assert json.loads(kept_all)["kept"] == [10, 12]
    document = json.loads(mfdist("checkpoint", "prune", run_dir, "--keep-last", "1", "--json")[1])
    assert (document["deleted"], document["kept"]) == ([10], [12])
    assert mfdist("checkpoint", "verify", run_dir)[0] == 0
    for wrong in (("--keep-last", "0"), ()):
        assert mfdist("checkpoint", "prune", run_dir, *wrong)[0] == 2
    assert mfdist("checkpoint", "prune", run_dir / "checkpoints" / "step-000000012", "--keep-last", "1")[0] == 2


def test_export_and_import_keep_a_step(mfdist, finished, tmp_path):
    run_dir = finished[0]
    code, out, err = mfdist("checkpoint", "export", run_dir, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert "dense/rng/cpu" in json.loads(out)["tensors"]
    code, out, err = mfdist("checkpoint", "import", tmp_path / "out", "--out", tmp_path / "in", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["step"] == 12
    last = run_dir / "checkpoints" / "step-000000012"
    assert json.loads(mfdist("checkpoint", "diff", last, tmp_path / "in", "--json")[1])["is_same"] is True
    code, out, err = mfdist("checkpoint", "export", run_dir, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert mfdist("checkpoint", "import", tmp_path / "none", "--out", tmp_path / "in")[0] == 2


def test_a_run_or_a_step_of_it_becomes_a_folder_for_transformers(mfdist, finished, tmp_path):
    run_dir = finished[0]
    code, out, err = mfdist("checkpoint", "export", run_dir, "--out", tmp_path / "hf", "--format", "hf", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["format"], document["step"]) == ("hf", 12)
    assert "model.blocks.0.qkv.table.weight" in document["tensors"]
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert wanted <= {path.name for path in (tmp_path / "hf").iterdir()}
    step = run_dir / "checkpoints" / "step-000000010"
    assert mfdist("checkpoint", "export", step, "--out", tmp_path / "earlier", "--format", "hf")[0] == 0
    shutil.copytree(step, tmp_path / "alone" / step.name)
    code, _, err = mfdist(
        "checkpoint", "export", tmp_path / "alone" / step.name, "--out", tmp_path / "x", "--format", "hf"
    )
    assert code == 2 and "needs a run, for its tokenizer" in err
    code, _, err = mfdist("checkpoint", "export", run_dir, "--out", tmp_path / "y", "--format", "gguf")
    assert code == 2 and "--format must be one of safetensors, hf, dcp; got gguf" in err

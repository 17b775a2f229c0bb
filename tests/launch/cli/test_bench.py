"""`mfdist bench kernels`: a table for people, JSON for programs, and refusals."""

import json
import signal
import subprocess

import pytest
import torch

from tests.launch.cli.conftest import COMMAND, DEADLINE_S, environment

FIELDS = {
    "op": str,
    "case": str,
    "impl": str,
    "median_us": float,
    "spread": float,
    "bytes_per_s": float,
    "share_of_ceiling": float,
    "error": float,
    "tolerance": float,
    "repeats": int,
    "extra_bytes": (int, type(None)),
    "note": str,
}
SELECTED = ("bench", "kernels", "--device", "cpu", "--case", "demo-ffn2", "--seconds", "0.01")


def test_a_run_writes_the_document_that_the_reference_describes(mfdist, tmp_path):
    code, out, err = mfdist(*SELECTED, "--repeats", "1", "--json", tmp_path / "found.json")
    assert code == 0, err
    document = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert set(document) == {"machine", "versions", "ceilings", "results"}
    assert document["machine"]["device"] == "cpu" and document["machine"]["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["ceilings"]) == {"copy_bytes_per_s", "read_bytes_per_s"}
    assert all(rate > 0 for rate in document["ceilings"].values())
    for result in document["results"]:
        assert list(result) == list(FIELDS)
        assert all(isinstance(result[field], kind) for field, kind in FIELDS.items()), result
        assert result["median_us"] > 0 and result["spread"] >= 0 and 0 <= result["error"] <= result["tolerance"]
    ops = {(result["op"], result["impl"]) for result in document["results"]}
    assert {("gather_sum", "mfdist-fp32"), ("gather_sum", "torch-bf16"), ("row_gradient", "torch-fp32")} <= ops
    lines = out.splitlines()
    assert lines[0].startswith(document["machine"]["name"])
    assert len(lines) == 2 + len(document["results"])
    assert all("µs" in line and "demo-ffn2" in line for line in lines[2:])


def test_one_thread_is_timed_by_the_processor_and_told(mfdist, tmp_path):
    before = torch.get_num_threads()
    try:
        arguments = ("--threads", "1", "--op", "gather_sum", "--json", tmp_path / "found.json")
        code, out, err = mfdist(*SELECTED, *arguments)
    finally:
        torch.set_num_threads(before)
    assert code == 0, err
    assert ", 1 thread; memory" in out
    assert json.loads((tmp_path / "found.json").read_text("utf-8"))["machine"]["threads"] == 1


def test_an_early_end_keeps_what_was_found(workplace, tmp_path):
    """A real process, interrupted after its first results."""
    command = [*COMMAND, "bench", "kernels", "--device", "cpu", "--op", "gather_sum", "--case", "demo-*"]
    command += ["--seconds", "0.2", "--json", str(tmp_path / "found.json")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(workplace / "cache")
    )
    try:
        lines = [process.stdout.readline() for _ in range(3)]  # machine, head, a result
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert "demo-qkv" in lines[2]
    assert process.returncode == 1 and "stopped before the end" in err
    results = json.loads((tmp_path / "found.json").read_text("utf-8"))["results"]
    assert 1 <= len(results) < 12 and results[0]["case"] == "demo-qkv"


def test_checking_alone_times_nothing(mfdist):
    code, out, err = mfdist(*SELECTED, "--check-only", "--op", "gather_sum", "--impl", "mfdist")
    assert code == 0, err
    rows = out.splitlines()[2:]
    assert len(rows) == 2 and all("same bits 4 times" in row and "µs" not in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "base-qvk"], "there must be something to measure on cpu; got --case base-qvk; operations are"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["--json", "nowhere/found.json"], "--json must name a file in a folder that is there"),
    ],
)
def test_misuse(mfdist, arguments, message):
    code, out, err = mfdist("bench", "kernels", "--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(mfdist):
    code, _, err = mfdist("bench", "kernels", "--device", "cuda")
    assert code == 2 and "needs a GPU" in err


def test_decoding_is_timed_beside_the_twin(mfdist, tmp_path):
    sizes = ["--set", "model.num_layers=1", "--set", "model.hidden_dim=32", "--set", "data.vocab_size=300"]
    short = ["--distinct", 1, "--tokens", 2, "--rounds", 1, "--threads", 1, "--batch", 2]
    code, out, err = mfdist("bench", "decode", "demo", *sizes, *short, "--json", tmp_path / "found.json")
    assert (code, err) == (0, "")
    told = [line.split("  ")[0] for line in out.splitlines()[2:]]
    assert told == ["dense twin", "MemoryFormer", "one layer by itself:", "layer", "32 → 32", "32 → 96"]
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["model"]["vocab_size"] == 300 and document["machine"]["threads"] == 1
    twin, memory = document["results"]
    assert twin["ratio"] == 1.0 and twin["ratio_range"] == [1.0, 1.0]
    assert memory["ratio_range"] == [memory["ratio"]] * 2  # of one turn
    assert memory["bytes_read_per_token"] < twin["bytes_read_per_token"]


def test_a_decode_that_is_too_slow_is_a_failure(mfdist):
    sizes = ["--set", "model.num_layers=1", "--set", "model.hidden_dim=32", "--set", "data.vocab_size=300"]
    code, _, err = mfdist("bench", "decode", "demo", *sizes, "--tokens", 2, "--rounds", 2, "--at-least", 1000)
    assert code == 1 and "must write at 1000 of its twin's speed; got" in err
    code, _, err = mfdist(
        "bench", "decode", "demo", *sizes, "--set", "model.max_seq_len=16", "--set", "training.seq_len=16"
    )
    assert code == 2 and "model.max_seq_len must be more than the 16 tokens of the prompt; got 16" in err


def test_layers_are_timed_over_numbers_of_tokens_and_the_crossover_is_told(mfdist, tmp_path):
    sizes = ["--width", 32, "--width", 16, "--tokens", 8, "--tokens", 1, "--threads", 1, "--seconds", 0]
    code, out, err = mfdist("bench", "layers", *sizes, "--dtype", "bf16", "--json", tmp_path / "found.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith(", 1 thread, bf16, 8 bits")
    assert [line.split(":")[0] for line in lines if " ahead " in line] == ["16 → 16", "32 → 32"]
    document = json.loads((tmp_path / "found.json").read_text())
    assert [(each["in_features"], each["num_tokens"]) for each in document["results"]] == [
        (16, 1),
        (16, 8),
        (32, 1),
        (32, 8),
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["layers", "--dtype", "fp8"], '--dtype must be fp32 or bf16; got "fp8"'),
        (["layers", "--device", "tpu"], '--device must be auto, cpu or cuda; got "tpu"'),
        (["layers", "--width", "12"], "multiple of bits"),
        (["decode", "demo", "--distinct", "5"], "distinct layers must lie in 1..model.num_layers=4; got 5"),
        (["decode", "demo", "--dtype", "int8"], '--dtype must be fp32 or bf16; got "int8"'),
    ],
)
def test_what_cannot_be_measured_is_misuse(mfdist, arguments, told):
    code, _, err = mfdist("bench", *arguments)
    assert code == 2 and told in err

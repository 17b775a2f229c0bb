"""`mfdist bench learning`: real runs of both models, gone on with where they were, and what is made of them."""

import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from mfdist.benchmarks.learning import VARIANTS, Gap, Learned, Point, _without_compiling, gaps
from mfdist.checkpoint.lock import WriterLock
from mfdist.config import load_config

from .conftest import TINY


def bench(mfdist, out, *arguments):
    return mfdist("bench", "learning", "--out", out, "--preset", TINY, "--set", "data.source=text", *arguments)


def test_memory_and_twin_are_trained_once_and_compared(mfdist, workplace, tmp_path):
    found = tmp_path / "found.json"
    code, out, err = bench(mfdist, tmp_path / "runs", "--seeds", "0", "--minutes", "0")
    assert (code, err) == (0, "")
    assert "4 runs are missing" in out
    code, out, err = bench(mfdist, tmp_path / "runs", "--seeds", "0", "--json", found)
    names = ["memory", "twin-2e-3", "twin-2e-3-embedding-10", "twin-2e-3-embedding-10-decay-0.5"]
    assert (code, err.split("\n")[:-1]) == (0, [f"training {name}-seed-0" for name in names])
    assert all(f"ahead of {name} by" in out for name in names[1:])
    assert out.splitlines()[0].startswith(f"CPU, {torch.get_num_threads()} thread") and torch.__version__ in out
    assert out.count("; one seed each") == 3
    document = json.loads(found.read_text("utf-8"))
    assert document["versions"]["torch"] == torch.__version__ and document["machine"]["cpu"]
    results = document["results"]
    assert [result["variant"] for result in results] == names
    for result in results:
        assert [point["step"] for point in result["points"]] == [5, 10, 12]
        assert [point["tokens"] for point in result["points"]] == [640, 1280, 1536]
        seconds = [point["seconds"] for point in result["points"]]
        assert seconds == sorted(seconds) and seconds[0] > 0
    assert results[0]["points"][-1]["flops"] < results[1]["points"][-1]["flops"]
    assert not list((tmp_path / "runs").glob("*/checkpoints/*step*"))
    torn = tmp_path / "runs" / "twin-2e-3-seed-0" / "metrics.jsonl"
    torn.write_text("".join(torn.read_text("utf-8").splitlines(keepends=True)[:4]), "utf-8")
    code, again, err = bench(mfdist, tmp_path / "runs", "--seeds", "0", "--at-least", "1000")
    assert code == 1
    assert "training memory" not in err and "training twin-2e-3-seed-0" in err  # the one that was cut short
    assert "must be ahead of its twin by 1000 nats" in err
    assert again.splitlines()[2] == out.splitlines()[2]
    (tmp_path / "runs" / "twin-2e-3-embedding-10-seed-0" / "metrics.jsonl").unlink()
    code, out, err = bench(mfdist, tmp_path / "runs", "--seeds", "0", "--at-least", "-1000", "--minutes", "0")
    assert code == 1 and "1 runs are missing" in out and "not all of them were trained" in err
    metrics = tmp_path / "runs" / "memory-seed-0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text("utf-8").replace('"device": "CPU', '"device": "NVIDIA CPU'), "utf-8")
    code, out, err = bench(mfdist, tmp_path / "runs", "--seeds", "0", "--only", "memory", "--at-least", "-9")
    assert out.splitlines()[2].endswith(f"  on NVIDIA {out.split(', torch')[0]}")
    assert code == 1 and "nats a token; --only must name memory and a twin" in err


def test_a_run_that_is_kept_is_not_taken_for_one_of_other_settings(mfdist, workplace, tmp_path):
    only = ("--seeds", "0", "--only", "memory")
    assert bench(mfdist, tmp_path / "runs", *only)[0] == 0
    code, out, err = bench(mfdist, tmp_path / "runs", *only, "--set", "training.steps=5")
    assert code == 2 and "has training.steps=12, not 5; move it away" in err
    assert "memory " not in out
    assert (tmp_path / "runs" / "memory-seed-0" / "metrics.jsonl").exists()


def test_a_folder_that_another_bench_trains_in_is_left_alone(mfdist, workplace, tmp_path):
    cut_short = tmp_path / "runs" / "memory-seed-0" / "metrics.jsonl"
    cut_short.parent.mkdir(parents=True)
    cut_short.write_text("", "utf-8")
    only = ("--seeds", "0", "--only", "memory")
    other = WriterLock(tmp_path / "runs")
    try:
        code, _, err = bench(mfdist, tmp_path / "runs", *only)
        assert code == 1 and f"may use {tmp_path / 'runs'}; pid {os.getpid()}" in err and cut_short.exists()
        code, out, err = bench(mfdist, tmp_path / "runs", *only, "--minutes", "0")  # nothing is trained
        assert (code, err) == (0, "") and "1 runs are missing" in out
    finally:
        other.release()
    assert bench(mfdist, tmp_path / "runs", *only)[0] == 0
    WriterLock(tmp_path / "runs").release()


def test_a_run_that_is_not_finite_is_told_once_and_others_go_on(mfdist, workplace, tmp_path):
    found = tmp_path / "found.json"
    only = ("--seeds", "0", "--only", "memory", "--only", "twin-2e-3", "--set", "optimizer.tables.lr=1e38")
    for trained in (["memory", "twin-2e-3"], []):
        code, out, err = bench(mfdist, tmp_path / "runs", *only, "--at-least", "-9", "--json", found)
        assert code == 1
        assert err.splitlines()[:-1] == [f"training {name}-seed-0" for name in trained]
        assert "ahead of its twin by -9 nats a token; memory ended early" in err
        assert out.splitlines()[2].split(maxsplit=2)[2].startswith("the loss must stay finite; got ")
        assert out.splitlines()[3].startswith("twin-2e-3") and "ahead" not in out
        memory, twin = json.loads(found.read_text("utf-8"))["results"]
        assert memory["note"] and not twin["note"] and twin["points"][-1]["step"] == 12
    code, _, err = bench(mfdist, tmp_path / "runs", *only[:-1], "optimizer.tables.lr=1e-3")
    assert code == 2 and "has optimizer.tables.lr=1e+38, not 0.001" in err


def test_variants_start_from_a_memoryformer(mfdist, workplace, tmp_path):
    code, _, err = bench(mfdist, tmp_path / "runs", "--only", "memory", "--set", "model.kind=dense")
    assert code == 2 and "must start from a MemoryFormer; got model.kind=dense" in err
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_a_variant_would_not_follow_is_refused(mfdist, workplace, tmp_path):
    code, _, err = bench(mfdist, tmp_path / "runs", "--set", "optimizer.dense.weight_decay=0.3")
    assert code == 2 and not (tmp_path / "runs").exists()
    assert "got optimizer.dense.weight_decay=0.3, and twin-2e-3 has optimizer.dense.weight_decay=0.1" in err
    for same, code in (("optimizer.dense.lr = 0.002", 2), ("training.seed=9", 2), ("optimizer.dense.lr = 0.001", 0)):
        only = ("--only", "twin-1e-3", "--set", same, "--seeds", "0", "--minutes", "0")
        assert bench(mfdist, tmp_path / "runs", *only)[0] == code


def test_a_run_that_is_told_to_stop_is_no_result_and_ends_the_bench(mfdist, workplace, tmp_path):
    def stop_once_it_trains():
        metrics = tmp_path / "runs" / "memory-seed-0" / "metrics.jsonl"
        while not (metrics.exists() and "stepped" in metrics.read_text("utf-8")):
            if is_over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    is_over = threading.Event()
    stopper = threading.Thread(target=stop_once_it_trains)
    stopper.start()
    try:
        code, out, err = bench(mfdist, tmp_path / "runs", "--seeds", "0", "--set", "training.steps=20000")
    finally:
        is_over.set()
        stopper.join()
    assert (code, err.splitlines()[0]) == (0, "training memory-seed-0")
    assert "training twin" not in err
    assert len(out.splitlines()) == 3 and out.splitlines()[2].startswith("4 runs are missing")


def test_every_variant_is_a_configuration(mfdist):
    for variant in VARIANTS:
        settings = [f"{key}={value}" for key, value in variant.settings.items()]
        assert load_config("tiny", settings).training.steps > 0
    code, out, _ = mfdist("bench", "learning", "--list")
    assert (code, len(out.splitlines())) == (0, len(VARIANTS))


@pytest.mark.parametrize(
    "wrong",
    [
        ("--only", "nothing"),
        ("--seeds", "one"),
        ("--seeds", "1,01"),
        ("--json", "no/such/file.json"),
        ("--preset", "tny"),
    ],
)
def test_misuse_trains_nothing(mfdist, workplace, tmp_path, wrong):
    code, _, err = mfdist("bench", "learning", "--out", tmp_path / "runs", *wrong)
    assert (code, err.splitlines()[-1].startswith("mfdist: ")) == (2, True)
    assert not (tmp_path / "runs").exists()
    code, _, err = mfdist("bench", "learning")
    assert (code, len(err.splitlines())) == (2, 1) and "give --out FOLDER" in err


def test_time_spent_compiling_is_not_trained():
    assert _without_compiling([20.0, 1.0, 1.2, 1.0, 2.0, 8.0, 0.5]) == [1.2, 1.2, 1.2, 1.0, 2.0, 1.2, 0.5]


def learned(variant, question, seed, *curve):
    points = [
        Point(step=n, tokens=n, flops=n, seconds=seconds, loss=loss, bits_per_byte=0.0)
        for n, (seconds, loss) in enumerate(curve)
    ]
    return Learned(
        variant=variant,
        question=question,
        seed=seed,
        device="CPU",
        tokens_per_s=1.0,
        peak_memory_bytes=1,
        points=points,
    )


def test_gaps_are_to_all_twins_the_best_first_at_equal_tokens_and_at_equal_seconds():
    found = [
        learned("memory", "memory", 0, (10, 4.0), (20, 3.0)),
        learned("memory", "memory", 1, (10, 4.0), (20, 3.2)),
        learned("twin-a", "twin", 0, (5, 4.5), (10, 3.75)),
        learned("twin-a", "twin", 1, (5, 4.5), (10, 3.65)),
        learned("twin-b", "twin", 0, (5, 4.4), (10, 3.9)),
        learned("lr-1e-3", "learning rate", 0, (5, 1.0), (10, 1.0)),
    ]
    best, other = gaps(found)
    assert best == Gap(
        twin="twin-a", at_tokens=pytest.approx(0.6), at_seconds=pytest.approx(-0.3), spread=pytest.approx(0.2)
    )
    assert (other.twin, other.at_tokens) == ("twin-b", pytest.approx(0.8))
    assert gaps(found[:2]) == gaps(found[2:]) == []
    assert not gaps([*found[:3], replace(found[3], note="diverged")])  # the mean would be of other seeds
    assert [gap.spread for gap in gaps([found[0], found[2]])] == [None]  # of one seed each nothing is known

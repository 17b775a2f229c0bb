"""`mfdist bench size`: real tables are trained, checked, and timed beside each other."""

import json

import pytest
import torch

from mfdist.benchmarks import table_size

SMALL = ["--row-dim", 64, "--tokens", 32, "--lookups", 8, "--turns", 25, "--device", "cpu"]


def test_tables_of_two_sizes_are_trained(mfdist, tmp_path):
    file = tmp_path / "found.json"
    code, out, err = mfdist("bench", "size", "--size", "128KB", "--size", "2MB", *SMALL, "--json", file)
    assert (code, err) == (0, "")
    assert "of the first one's bytes a second" in out
    small, large = json.loads(file.read_text("utf-8"))["results"]
    assert (small["num_rows"], large["num_rows"]) == (1000, 15625)
    assert 0 < small["error"] < 2**-7 and 0 < large["error"] < 2**-7
    assert small["step_s"] > small["forward_s"] > 0 and small["step_spread"] >= 0


def test_rows_that_were_not_updated_as_they_should_be_are_found(monkeypatch):
    monkeypatch.setattr(table_size, "_LR", -table_size._LR)  # what is expected goes the other way
    table = table_size.LocalTable(
        table_size.TableSpec(name="t", num_rows=100, row_dim=8, dtype=torch.bfloat16),
        fuse=table_size.RowAdagrad(lr=0.1),
    )
    speed = table_size._measured(table, torch.device("cpu"), 16, 4, 1)
    assert speed.is_wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "10"], "a table must have a row, of 2048 bytes here; got 10 bytes"),
        (["--size", "x"], 'such as 80GB or 64GiB; got "x"'),
        (["--json", "nowhere/found.json"], "--json must name a file"),
    ],
)
def test_misuse_is_one_line(mfdist, arguments, message):
    code, out, err = mfdist("bench", "size", *arguments)
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1


def test_a_table_larger_than_memory_is_told_after_what_was_found(mfdist, tmp_path):
    file = tmp_path / "found.json"
    code, out, err = mfdist("bench", "size", "--size", "128KB", "--size", "9000TB", *SMALL, "--json", file)
    assert code == 1 and len(out.splitlines()) == 3 and len(err.splitlines()) == 1
    assert "tables must fit into memory; 8.0 PiB with what a step needs do not; give a smaller --size" in err
    assert len(json.loads(file.read_text("utf-8"))["results"]) == 1


def test_too_slow_is_a_failure(mfdist):
    code, _, err = mfdist("bench", "size", "--size", "128KB", *SMALL, "--at-least", "1000")
    assert code == 1 and "must have 1000 of the first one's bytes/s; got 1.00" in err

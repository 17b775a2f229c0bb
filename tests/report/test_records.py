"""Metrics read while they are written."""

import json

from mfdist.report.records import RunRecords


def write(path, *records, mode="a"):
    with path.open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_only_what_is_new_is_read_and_an_unfinished_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(path)
    assert not records.refresh() and records.last is None and records.of("stepped") == []
    write(path, {"event": "started", "time": 1.0}, {"event": "stepped", "step": 1, "time": 2.0})
    assert records.refresh() and not records.refresh()
    version = records.version
    with path.open("a") as file:
        file.write('{"event": "stepped", "st')
    records.refresh()
    assert [record["step"] for record in records.of("stepped")] == [1] and records.version == version
    with path.open("a") as file:
        file.write('ep": 2, "time": 5.0}\n')
    assert records.refresh() and records.version != version
    assert [record["step"] for record in records.of("stepped")] == [1, 2]
    assert (records.first["event"], records.last["step"], records.longest_gap_s) == ("started", 2, 3.0)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(path)
    write(path, *({"event": "stepped", "step": step} for step in (1, 2, 3)))
    records.refresh()
    write(tmp_path / "new", {"event": "stepped", "step": 1}, {"event": "stepped", "step": 7})  # as a resumed run does
    (tmp_path / "new").replace(path)
    assert records.refresh()
    assert [record["step"] for record in records.of("stepped")] == [1, 7]
    path.unlink()
    assert records.refresh() and records.last is None and not records.refresh()


def test_what_follows_an_unreadable_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(path)
    path.write_bytes(b'{"event": "stepped", "step": 1}\n\xff\0\0\n{"event": "stepped", "step": 2}\n')
    records.refresh()
    assert records.is_torn and [record["step"] for record in records.of("stepped")] == [1]

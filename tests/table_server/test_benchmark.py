"""The benchmark of servers compares before it times, and its figures are those of what ran."""

from pathlib import Path

from mfdist.table_server.benchmark import measure_load, measure_log, measure_lookups, measure_memory


def test_lookups_are_compared_and_timed() -> None:
    decode, train = measure_lookups(0.1)
    assert (decode.case, train.case) == ("decode", "tiny-train")
    for result, num_tokens in ((decode, 64), (train, 4096)):
        assert result.share_of_grpc > 0
        assert result.share_of_local > 0
        assert result.reply_bytes > num_tokens * 512 * 4
        assert result.request_bytes > num_tokens * 64 * 5


def test_load_and_log_are_measured(tmp_path: Path) -> None:
    load = measure_load(0.5)
    assert load.requests_per_s > 0
    assert 0 < load.p50_s <= load.p99_s
    log = measure_log(tmp_path, rounds=1, pushes=2)
    assert log.logged_per_s > 0
    assert log.push_bytes > 256 * 256 * 4
    assert list(tmp_path.iterdir()) == []


def test_memory_is_watched_while_everything_runs(tmp_path: Path) -> None:
    held = measure_memory(tmp_path, 1.0)
    assert held.requests_per_s > 0
    assert held.pushes_per_s > 0
    assert 0 < held.least_bytes <= held.first_bytes <= held.most_bytes
    assert abs(held.drift) < 1
    assert list(tmp_path.iterdir()) == []

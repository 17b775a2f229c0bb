"""The figures as Prometheus reads them, over HTTP, and the dashboard that asks for them."""

import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mfdist.errors import ConfigError, UnavailableError
from mfdist.table_server.auth import new_token
from mfdist.table_server.certificates import init_tls
from mfdist.table_server.metrics import Metrics, MetricsPage, Observed, TableFigures
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.sections import MetricsConfig, SecurityConfig
from tests.table_server.processes import server
from tests.table_server.raw_client import RawClient, acknowledged, tensor

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "table_server" / "grafana" / "dashboard.json"
PAGE = ROOT / "docs" / "reference" / "metrics.md"
TABLE = TableFigures(
    name='we"ird\\', version=7, num_rows=100, num_bytes=6400, row_hits=55, saved_version=4, replica_lag=2
)


@contextmanager
def page(
    metrics: Metrics, security: SecurityConfig | None = None, listen: str = "127.0.0.1:0"
) -> Iterator[MetricsPage]:
    shown = MetricsPage(metrics, MetricsConfig(listen=listen), security or SecurityConfig())
    try:
        yield shown
    finally:
        shown.stop()


def busy() -> Metrics:
    """Return the figures of a server that has seen one of everything."""
    metrics = Metrics(
        Observed(
            tables=lambda: [TABLE],
            queue_depth=lambda: 3.0,
            log_bytes=lambda: 1000.0,
            log_pending_bytes=lambda: 24.0,
            checkpoint_age_s=lambda: 60.0,
            failing=lambda: {"log": True, "checkpoint": False},
            epoch=lambda: 2.0,
            role=lambda: "alone",
        )
    )
    for method in ("Lookup", "Push", "Lookup"):
        metrics.began(method)
    metrics.finished("Lookup", "OK", 0.003, 100, 200)
    metrics.finished("Push", "ABORTED", 0.2, 1000, 0)
    metrics.refused("token")
    return metrics


def read(url: str, token: str | None = None, context: ssl.SSLContext | None = None) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return str(answer.read().decode())


def test_the_page_has_what_was_counted_and_what_the_server_is_asked() -> None:
    with page(busy()) as shown:
        text = read(f"http://{shown.address}/metrics")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    expected = {
        ("mfdist_requests_total", "Lookup", "OK"): 1,
        ("mfdist_requests_total", "ABORTED", "Push"): 1,
        ("mfdist_requests_in_flight", "Lookup"): 1,
        ("mfdist_requests_in_flight", "Push"): 0,
        ("mfdist_request_bytes_total", "Push"): 1000,
        ("mfdist_reply_bytes_total", "Lookup"): 200,
        ("mfdist_request_seconds_bucket", "0.0025", "Lookup"): 0,
        ("mfdist_request_seconds_bucket", "0.005", "Lookup"): 1,
        ("mfdist_request_seconds_count", "Push"): 1,
        ("mfdist_refusals_total", "token"): 1,
        ("mfdist_queue_depth",): 3,
        ("mfdist_log_bytes",): 1000,
        ("mfdist_log_pending_bytes",): 24,
        ("mfdist_checkpoint_age_seconds",): 60,
        ("mfdist_failing", "log"): 1,
        ("mfdist_failing", "checkpoint"): 0,
        ("mfdist_epoch",): 2,
        ("mfdist_role", "alone"): 1,
        ("mfdist_table_replica_lag", TABLE.name): 2,
        ("mfdist_table_version", TABLE.name): 7,
        ("mfdist_table_checkpoint_lag", TABLE.name): 3,
        ("mfdist_table_rows", TABLE.name): 100,
        ("mfdist_table_bytes", TABLE.name): 6400,
        ("mfdist_row_hits_total", TABLE.name): 55,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert samples[("process_resident_memory_bytes",)] > 2**20


def test_stats_has_the_same_samples_under_the_same_names() -> None:
    metrics = busy()
    with page(metrics) as shown:
        lines = [line for line in read(f"http://{shown.address}/metrics").splitlines() if not line.startswith("#")]
    shown_names = {line.rpartition(" ")[0] for line in lines if "_created" not in line and line.startswith("mfdist_")}
    assert shown_names == {name for name in metrics.samples() if name.startswith("mfdist_")}


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(Observed()), Metrics(Observed())
    one.refused("rate")
    assert one.samples()['mfdist_refusals_total{reason="rate"}'] == 1
    assert 'mfdist_refusals_total{reason="rate"}' not in other.samples()


def test_the_page_asks_for_a_token_where_there_are_tokens(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens.toml"
    reader, pusher = new_token(token_file, "a", ["read"]), new_token(token_file, "b", ["push"])
    with page(busy(), SecurityConfig(token_file=token_file)) as shown:
        url = f"http://{shown.address}/metrics"
        assert "mfdist_requests_total" in read(url, reader)
        for token in (None, pusher, "wrong"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                read(url, token)
            assert caught.value.code == 401
            caught.value.close()


def test_the_page_is_behind_tls_where_the_server_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    init_tls(tmp_path / "tls")
    folder = tmp_path / "tls"
    security = SecurityConfig(
        certificate=folder / "server.pem", private_key=folder / "server.key", token_file=folder / "tokens.toml"
    )
    token = (folder / "reader.token").read_text("ascii").strip()
    trusting = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with page(busy(), security) as shown:
        host, port = shown.address.split(":")
        with socket.create_connection((host, int(port)), timeout=10):  # one that says nothing holds up nobody
            assert "mfdist_requests_total" in read(f"https://{shown.address}/metrics", token, trusting)
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                read(f"http://{shown.address}/metrics", token)
        assert "mfdist_requests_total" in read(f"https://{shown.address}/metrics", token, trusting)
    assert token not in caplog.text


def test_where_the_page_may_not_listen() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.listen must be loopback, or have TLS and tokens"):
        MetricsPage(busy(), MetricsConfig(listen="0.0.0.0:0"), SecurityConfig())
    with page(busy()) as shown, pytest.raises(UnavailableError, match=r"metrics\.listen must be free"):
        MetricsPage(busy(), MetricsConfig(listen=shown.address), SecurityConfig())


def families(metrics: Metrics) -> dict[str, set[str]]:
    """Return sample name → the labels it may have."""
    return {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_every_query_of_the_dashboard_is_about_metrics_that_exist() -> None:
    known = families(busy())
    document = json.loads(DASHBOARD.read_text("utf-8"))
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [
        variable["query"]["query"] for variable in document["templating"]["list"] if variable["type"] == "query"
    ]
    used: set[str] = set()
    for query in queries:
        names = re.findall(r"\b(?:mfdist|process)_\w+", query)
        assert names, query
        for name, matchers in re.findall(r"\b((?:mfdist|process)_\w+)(?:\{([^}]*)\})?", query):
            assert name in known, f"{name} in {query}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert labels <= known[name] | {"instance", "job"}, query
        for grouped in re.findall(r"\bby\s*\(([^)]*)\)", query):
            allowed = set().union(*(known[name] for name in names)) | {"instance", "job"}
            assert {label.strip() for label in grouped.split(",")} <= allowed, query
        assert query.count("(") == query.count(")")
        used.update(names)
    ours = {name.removesuffix("_bucket") for name in known if name.startswith("mfdist_")}
    unseen = ours - {name.removesuffix("_bucket") for name in used}
    assert unseen <= {"mfdist_request_seconds_sum", "mfdist_request_seconds_count", "mfdist_epoch"}
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


def test_the_reference_page_names_every_metric() -> None:
    text = PAGE.read_text("utf-8")
    assert set(re.findall(r"mfdist_\w+", text)) <= {*families(busy()), "mfdist_request_seconds"}
    said = set(re.findall(r"^\| `(mfdist_\w+)", text, re.MULTILINE))
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in families(busy()) if name.startswith("mfdist_")}
    assert said == ours


def test_the_page_names_all_that_a_server_counts(tmp_path: Path) -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE))
    lookups = pb.Lookups(row_ids=tensor(np.array([[3, 9]])), scores=tensor(np.ones((1, 2), np.float32)))
    with server(tmp_path / "data") as process:
        client = RawClient(process.address)
        client.create("a")
        client.join()
        for _ in range(2):
            acknowledged(client.push(client.message("a", 1)))
        list(client.stub.Lookup(iter([pb.LookupRequest(table="a", lookups=lookups)]), timeout=60))
        client.rows("a")
        client.stub.Save(pb.SaveRequest(), timeout=60)
        counters = client.stub.Stats(pb.StatsRequest(), timeout=60).counters
        client.channel.close()
    assert counters["pushes"] == 2
    assert counters["known_pushes"] == counters["lookup_blocks"] == counters["checkpoints"] == 1
    assert counters["reply_bytes"] > 64 * 8 * 4
    told = {re.sub(r"(_count|_sum|_bucket)?({.*})?$", "", name) for name in counters}
    assert {name for name in told if not name.startswith(("process_", "python_"))} <= named

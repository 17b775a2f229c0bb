"""The live report over HTTP, as browsers ask for it and as others may try."""

import http.client
import json
import threading

import pytest

from mfdist.errors import UnavailableError
from mfdist.report.document import Report
from mfdist.report.server import ReportServer
from tests.report import recorded as r
from tests.report.recorded import recorded


@pytest.fixture
def served(tmp_path):
    run = recorded(tmp_path / "run", r.whole_run()[:8])
    server = ReportServer(Report(run.path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, run
    server.close()
    thread.join(30)
    assert not thread.is_alive()


def get(server, path, host=None):
    """Return (status, type, content) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def test_the_page_is_live_and_updates_say_only_what_is_new(served):
    server, run = served
    assert server.address == f"http://127.0.0.1:{server.port}/"
    status, kind, html = get(server, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "data-live-every" in html and "connect-src &#39;self&#39;" in html
    status, _, text = get(server, "/update?have=nothing")
    fresh = json.loads(text)
    have = fresh["document"]["version_of_run"]
    assert status == 200 and fresh["document"]["runs"][0]["step"] == 7
    assert get(server, f"/update?have={have}")[0] == 204
    record = {"event": "stepped", "time": 1.0, "step": 8, **r.stepped(8).__dict__}
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    status, _, text = get(server, f"/update?have={have}")
    assert status == 200 and json.loads(text)["document"]["runs"][0]["step"] == 8


def test_other_paths_are_not_there_and_other_names_are_refused(served):
    server, _ = served
    assert get(server, "/../config.toml")[0] == 404
    assert get(server, "/", host="rebound.example")[0] == 403
    assert get(server, "/update", host=f"rebound.example:{server.port}")[0] == 403
    assert get(server, "/update?have=", host=f"localhost:{server.port}")[0] == 200


def test_a_run_that_goes_away_is_told(served):
    server, run = served
    run.config_path.unlink()
    status, _, text = get(server, "/")
    assert status == 500 and "config.toml" in text


def test_a_port_that_is_taken_is_named(served):
    server, run = served
    with pytest.raises(UnavailableError, match=rf"got --port {server.port} \(Address already in use\)"):
        ReportServer(Report(run.path), server.port)

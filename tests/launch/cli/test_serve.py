"""What `mfdist serve` refuses before it begins, and the certificates it makes."""

import json

import pytest

from mfdist.table_server.config import load_server_config


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", "0.0.0.0:0"], "server.listen must be loopback, or have TLS and tokens; got 0.0.0.0:0"),
        (["--metrics", "0.0.0.0:0"], "metrics.listen must be loopback, or have TLS and tokens; got 0.0.0.0:0"),
        (["--listen", "nowhere"], 'server.listen must be HOST:PORT, such as 127.0.0.1:0 or [::1]:7400; got "nowhere"'),
        (["--peer", "10.0.0.9:7070"], "a server must be reached by TLS unless it is on loopback; got 10.0.0.9:7070"),
        (["--peer", "nowhere"], 'replication.peer must be HOST:PORT, such as 127.0.0.1:0 or [::1]:7400; got "nowhere"'),
        (["--host", "x"], "--host goes with --init-tls"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(mfdist, tmp_path, arguments, says):
    code, out, err = mfdist("serve", "--data", str(tmp_path / "data"), *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_certificates_and_tokens_for_a_trial(mfdist, tmp_path):
    code, out, _ = mfdist("serve", "--init-tls", str(tmp_path / "tls"), "--host", "a.example.org", "--json")
    assert code == 0
    files = json.loads(out)["files"]
    assert str(tmp_path / "tls" / "server.pem") in files
    tokens = [path.read_text("ascii").strip() for path in (tmp_path / "tls").glob("*.token")]
    assert len(tokens) == 3
    assert not any(token in out for token in tokens)
    code, _, err = mfdist("serve", "--init-tls", str(tmp_path / "tls"))
    assert code == 2
    assert "ca.pem exists; choose another" in err


def test_the_keys_are_a_configuration_file_that_changes_nothing(mfdist, tmp_path):
    code, out, err = mfdist("serve", "--keys")
    assert (code, err) == (0, "")
    path = tmp_path / "server.toml"
    path.write_text(out, "utf-8")
    assert load_server_config(path) == load_server_config(None)
    assert "[limits]" in out
    assert "# requests of one client at a time\nmax_requests_in_flight = 256\n" in out

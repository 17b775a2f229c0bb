"""Tokens and the file they are read from."""

import hashlib
import hmac
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.errors import ConfigError
from mfdist.table_server import auth
from mfdist.table_server.auth import Tokens, bearer_token, new_token

DIGEST = hashlib.sha256(b"x").hexdigest()


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.touch(mode)
    path.write_text(text, "utf-8")
    path.chmod(mode)
    return path


def test_a_token_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = new_token(path, "trainer-1", ["push", "read"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert token not in path.read_text("utf-8")
    assert len(token) >= 43  # 256 bits
    client = Tokens(path).client_of(token)
    assert client is not None
    assert (client.name, client.rights) == ("trainer-1", {"push", "read"})
    assert Tokens(path).client_of(token[:-1]) is None
    assert Tokens(path).client_of("") is None
    assert Tokens(path).client_of("\udcff") is None


def test_every_token_is_compared_in_constant_time(
    tmp_path: Path, tokens: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is right, all are compared, by the function that is made for it."""
    compared: list[str] = []

    def compare(one: str, other: str) -> bool:
        compared.append(other)
        return hmac.compare_digest(one, other)

    known = Tokens(tmp_path / "tokens.toml")
    monkeypatch.setattr(auth, "hmac", type("counting", (), {"compare_digest": staticmethod(compare)}))
    for token in (tokens["reader"], tokens["admin"], "wrong"):
        compared.clear()
        known.client_of(token)
        assert len(compared) == len(tokens)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold tables such as"),
        ("tokens = 3", "must hold tables such as"),
        ("secret-token", "must be TOML"),
        ("[token.a]\nsha256 = 'x'", "must hold tables such as"),
        ("[tokens.a]\ntoken = 'hunter2'\nrights = ['read']", "the keys sha256 and rights"),
        ("[tokens.a]\nsha256 = 'hunter2'\nrights = ['read']", "64 hexadecimal digits"),
        (f"[tokens.a]\nsha256 = '{DIGEST}'\nrights = []", 'list of "read", "push" and "admin"'),
        (f"[tokens.a]\nsha256 = '{DIGEST}'\nrights = ['write']", 'list of "read", "push" and "admin"'),
        (f"[tokens.a]\nsha256 = '{DIGEST}'\nrights = 'read'", 'list of "read", "push" and "admin"'),
        (f"[tokens.a]\nsha256 = '{DIGEST}'\nrights = [['read']]", 'list of "read", "push" and "admin"'),
    ],
)
def test_a_wrong_file_is_refused_without_quoting_it(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "tokens.toml", text)
    with pytest.raises(ConfigError, match=says) as caught:
        Tokens(path)
    assert "hunter2" not in str(caught.value)
    assert "secret-token" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "tokens.toml", f"[tokens.a]\nsha256 = '{DIGEST}'\nrights = ['read']", mode)
    with pytest.raises(ConfigError, match=f"must not be open to others; .* has mode {mode:04o}; chmod 600"):
        Tokens(path)
    path.chmod(0o640)  # a group is how orchestrators hand secrets to those who serve
    assert Tokens(path).client_of("x") is not None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens\.toml: No such file"):
        Tokens(tmp_path / "tokens.toml")


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a]", 'a"', "ä", "a\n"])
def test_a_clients_name_is_a_plain_word(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        new_token(tmp_path / "tokens.toml", name, ["read"])
    assert not (tmp_path / "tokens.toml").exists()


def test_a_clients_name_is_given_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    new_token(path, "a", ["read"])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match='has "a"'):
        new_token(path, "a", ["read"])
    with pytest.raises(ConfigError, match='"read", "push" and "admin"'):
        new_token(path, "b", [])
    assert path.read_bytes() == before


@given(st.text(max_size=60), st.sampled_from(["Bearer ", "bearer ", "BEARER ", "Basic ", ""]))
def test_only_bearer_tokens_are_taken(text: str, scheme: str) -> None:
    found = bearer_token([("user-agent", "x"), ("authorization", scheme + text)])
    if scheme.strip().lower() == "bearer":
        assert found == (text.strip() or None)
    elif not text.lower().startswith("bearer"):
        assert found is None
    assert bearer_token(None) is None
    assert bearer_token([("authorization", b"Bearer x")]) is None

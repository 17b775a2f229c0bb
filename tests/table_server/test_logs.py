"""What a server writes: lines for people or JSON, and no secrets in either."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.table_server.logs import blotted, configure
from mfdist.table_server.sections import LogsConfig


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave logging as it was."""
    root, ours = logging.getLogger(), logging.getLogger("mfdist")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def written(form: str, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    configure(LogsConfig.model_validate({"format": form, "level": level}), stream)
    return logging.getLogger("mfdist.table_server.somewhere"), stream


def test_json_is_one_object_a_line() -> None:
    logger, stream = written("json")
    logger.warning("refused: %s", "a\nb", extra={"fields": {"client": "trainer", "tries": 3, "level": "fake"}})
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logger.exception("a defect")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "refused: a\nb"
    assert (first["level"], first["client"], first["tries"]) == ("warning", "trainer", 3)
    assert first["logger"] == "mfdist.table_server.somewhere"
    assert first["time"].endswith("Z")
    assert "ZeroDivisionError" in second["error"]


def test_text_is_one_line_that_nobody_can_forge() -> None:
    logger, stream = written("text")
    logger.info(
        "table %s", "x\n2026-01-01T00:00:00Z ERROR all is lost", extra={"fields": {"host": "10.0.0.7", "client": None}}
    )
    [line] = stream.getvalue().splitlines()
    assert line.endswith("INFO table x 2026-01-01T00:00:00Z ERROR all is lost (host=10.0.0.7)")


def test_levels() -> None:
    logger, stream = written("text", "debug")
    logger.debug("seen")
    logging.getLogger("grpc").debug("not seen")
    assert "seen" in stream.getvalue()
    assert "not seen" not in stream.getvalue()
    logger, stream = written("text", "error")
    logger.warning("not seen")
    assert stream.getvalue() == ""


KEY = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\nByqGSM49\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_are_blotted_out_wherever_they_stand(form: str) -> None:
    logger, stream = written(form)
    logger.warning("metadata %s", {"authorization": "Bearer s3cr3t-Token_x"})
    logger.warning("a key", extra={"fields": {"content": KEY, "header": "bearer s3cr3t-Token_x"}})
    try:
        raise ValueError(f"wrong header: Bearer s3cr3t-Token_x; {KEY}")
    except ValueError:
        logger.exception("failed")
    assert "s3cr3t" not in stream.getvalue()
    assert "MIGHAgEAMBMG" not in stream.getvalue()
    assert "ByqGSM49" not in stream.getvalue()
    assert stream.getvalue().count("[hidden]") >= 4


@given(st.from_regex(r"[A-Za-z0-9_-]{20,60}", fullmatch=True), st.sampled_from(["Bearer ", "bearer  ", "BEARER\t"]))
def test_any_bearer_token_is_blotted_out(token: str, scheme: str) -> None:
    assert token not in blotted(f"authorization: {scheme}{token}, and more")
    assert blotted(f"authorization: {scheme}{token}, and more").endswith(", and more")

"""What a server writes on stderr: a line for people, or a JSON object, for each thing that happened.

Modules log with `logging` and give what belongs to a line as `extra={"fields": {…}}`. What looks like a token is
blotted out, wherever it came from.
"""

import json
import logging
import re
import sys
import time
from typing import Any, TextIO

from mfdist.table_server.sections import LogsConfig

_SECRET = re.compile(
    r"(bearer\s+)[^\s\"',;]+|(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END|$)", re.IGNORECASE | re.DOTALL
)


def configure(config: LogsConfig, stream: TextIO | None = None) -> logging.Handler:
    """Send this process's logging to stderr (or `stream`), in the form that `config` asks for.

    Called once by the process that serves, never by a library. Returns the handler, the root logger's only one.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if config.format == "json" else _TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Other libraries have less to say: their debugging would drown ours.
    root.setLevel(max(logging.INFO, _level(config)))
    logging.getLogger("mfdist").setLevel(_level(config))
    logging.captureWarnings(True)
    return handler


def _level(config: LogsConfig) -> int:
    return logging.getLevelNamesMapping()[config.level.upper()]


def blotted(text: str) -> str:
    """Return `text` without what looks like a token or a private key."""
    return _SECRET.sub(lambda match: f"{match[1] or match[2]}[hidden]", text)


class _TextLines(logging.Formatter):
    """`2026-01-31T08:00:00.123Z WARNING refused: … (client=trainer host=10.0.0.7)`; one line, tracebacks after it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in _fields(record).items() if value is not None)
        line = " ".join(record.getMessage().split())
        text = f"{_instant(record)} {record.levelname} {line}{f' ({fields})' if fields else ''}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        return blotted(text)


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the line's own fields, and error with the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": _instant(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": blotted(record.getMessage()),
        }
        document |= {key: value for key, value in _fields(record).items() if key not in document}
        if record.exc_info:
            document["error"] = blotted(self.formatException(record.exc_info))
        return json.dumps(document, ensure_ascii=False, default=lambda value: blotted(str(value)))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", {})
    return {key: blotted(value) if isinstance(value, str) else value for key, value in fields.items()}


def _instant(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"

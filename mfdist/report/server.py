"""The live report: serves the page of a run on loopback while it trains."""

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from mfdist.errors import MfdistError, UnavailableError
from mfdist.report.document import Report
from mfdist.report.page import page, update

#: How often a page asks for what is new.
EVERY_MS = 2000
_LOOPBACK = "127.0.0.1"


class ReportServer:
    """Serves one report to browsers of this machine, from construction to `close`.

    It reads the run's folder and writes nothing. Pages of other sites cannot read it: requests must name this address.

    Args:
        report: what is shown.
        port: to listen on; 0 takes a free one.

    Raises:
        UnavailableError: the port is taken.
    """

    def __init__(self, report: Report, port: int = 0) -> None:
        self._report = report
        self._lock = threading.Lock()  # a report is read by one request at a time
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_GET(self) -> None:
                owner._answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing of each request."""

        try:
            self._server = _Server((_LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such port"
            raise UnavailableError(
                f"a live report needs a free port; got --port {port} ({reason}); leave it at 0 to take any"
            ) from None
        self.port = int(self._server.server_address[1])

    @property
    def address(self) -> str:
        """Return the page's address."""
        return f"http://{_LOOPBACK}:{self.port}/"

    def serve_forever(self) -> None:
        """Answer until `close` is called from another thread, or an exception ends it."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop answering, and let the port go."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        hosts = {f"{name}:{self.port}" for name in (_LOOPBACK, "localhost")}
        asked = urlsplit(request.path)
        if request.headers.get("Host") not in hosts:
            # A page of another site that had its name lead here could read the run otherwise.
            return _send(request, HTTPStatus.FORBIDDEN, "text/plain", "this page is at its own address only")
        try:
            with self._lock:
                match asked.path:
                    case "/":
                        return _send(request, HTTPStatus.OK, "text/html", page(self._report.document(), EVERY_MS))
                    case "/update":
                        have = parse_qs(asked.query).get("have", [""])[0]
                        if have == self._report.version:
                            return _send(request, HTTPStatus.NO_CONTENT, "text/plain", "")
                        fresh = json.dumps(update(self._report.document()), allow_nan=False)
                        return _send(request, HTTPStatus.OK, "application/json", fresh)
        except (MfdistError, OSError) as error:  # the run's folder went away, say
            return _send(request, HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))
        return _send(request, HTTPStatus.NOT_FOUND, "text/plain", "there is nothing here but /")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of browsers that went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _send(request: BaseHTTPRequestHandler, status: HTTPStatus, kind: str, text: str) -> None:
    content = text.encode()
    request.send_response(status)
    request.send_header("Content-Type", f"{kind}; charset=utf-8")
    request.send_header("Content-Length", str(len(content)))
    request.send_header("Cache-Control", "no-store")
    request.send_header("X-Content-Type-Options", "nosniff")
    request.send_header("Referrer-Policy", "no-referrer")
    request.end_headers()
    if status != HTTPStatus.NO_CONTENT:
        request.wfile.write(content)

"""`mfdist report`: one HTML file that shows a run, or the same live."""

import contextlib
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist.errors import ConfigError
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import write_json

if TYPE_CHECKING:
    from mfdist.report.document import Report


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the page; by default RUN/report.html.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN2", help="A run to hold it against, such as its dense twin; repeatable."),
    ] = None,
    is_opened: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write what the page says as one JSON document on stdout, and no page.")
    ] = False,
    is_served: Annotated[
        bool, typer.Option("--serve", help="Serve it on this machine instead, kept up to date while the run trains.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="With --serve: 0 takes a free port.")] = 0,
) -> int:
    """Show a run on one page that needs no network: what it learnt, how fast, and how its tables are used.

    Example: mfdist report runs/demo --open

    Example: mfdist report runs/demo --against runs/dense --out comparison.html

    Example: mfdist report runs/demo --serve

    With --serve the address is the first line on stdout; Ctrl-C ends it.
    """
    if as_json and (out or is_opened or is_served):
        raise ConfigError("--json writes the document instead of a page; leave out --out, --open and --serve")
    if is_served and out:
        raise ConfigError("--serve serves the page instead of writing it; leave out --out")
    if port and not is_served:
        raise ConfigError(f"--port goes with --serve; got --port {port}")
    from mfdist.report.document import Report

    found = Report(run, against or [])
    if as_json:
        write_json(found.document())
        return failures.DONE
    if is_served:
        return _serve(found, port, is_opened=is_opened)
    return _write(found, out or run / "report.html", is_opened=is_opened)


def _write(found: "Report", path: Path, *, is_opened: bool) -> int:
    from mfdist.report.page import page

    html = page(found.document())
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(html, "utf-8")
    partial.replace(path)
    typer.echo(path)
    if is_opened:
        _open(path.absolute().as_uri())
    return failures.DONE


def _serve(found: "Report", port: int, *, is_opened: bool) -> int:
    from mfdist.report.page import page
    from mfdist.report.server import ReportServer

    page(found.document())  # what is missing is told now, not to a browser
    server = ReportServer(found, port)
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()
    if is_opened:
        _open(server.address)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return failures.DONE


def _open(address: str) -> None:
    if not webbrowser.open(address):
        sys.stderr.write(f"there is no browser to open; the page is {address}\n")

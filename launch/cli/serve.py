"""`mfdist serve`: run a table server."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import write_json


def serve(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.toml", help="Settings; docs/reference/table-server.md explains them."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the server's log and checkpoints.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> int:
    """Hold tables in memory and serve them over gRPC until SIGTERM; what it acknowledged survives its death.

    Example: mfdist serve --data /var/lib/mfdist/0 --listen 127.0.0.1:7070

    The first line on stdout is the address, once calls are taken. Any number of servers hold a model's tables together;
    each needs a folder of its own.
    """
    from mfdist.table_server.config import load_server_config
    from mfdist.table_server.server import serve as run

    loaded = load_server_config(config)
    given = {"listen": listen, "data": data}
    section = loaded.server.model_copy(update={key: value for key, value in given.items() if value is not None})

    def say(address: str) -> None:
        if as_json:
            write_json({"address": address, "data": str(section.data)})
        else:
            typer.echo(address)
        sys.stdout.flush()

    run(loaded.model_copy(update={"server": section}), say)
    return failures.DONE

"""`mfdist top`: table servers and their tables, live in the terminal."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from mfdist.errors import ConfigError
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.top_view import shown
from mfdist.launch.server_rates import ServerRates, TableRates, server_rates, table_rates

if TYPE_CHECKING:
    from mfdist.table_server.channel import ChannelConfig
    from mfdist.table_server.watching import Seen


_FILE_WIDTH = 200  # of what is written to a file or a pipe


def top(
    servers: Annotated[list[str], typer.Argument(metavar="HOST:PORT", help="The servers to look at.")],
    once: Annotated[bool, typer.Option("--once", help="Look once, over one interval, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON document for each look, one a line.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between looks.")] = 1.0,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with a token that has the right to read.")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(metavar="PEM", help="Authority of the servers' certificates.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="PEM", help="A client certificate, for mutual TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its private key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Talk to any address without TLS.")] = False,
) -> int:
    """Show what table servers do: requests and bytes a second, latencies, the log, every table.

    Example: mfdist top 127.0.0.1:7070 127.0.0.1:7071

    Example: mfdist top tables-0:7070 --once --json --token-file reader.token --tls-ca ca.pem

    Ends with Ctrl-C. With --once, or where stdout is no terminal, the exit code is 1 if a server did not answer.
    """
    from mfdist.table_server.channel import ChannelConfig

    if (tls_cert is None) != (tls_key is None) or (tls_cert is not None and tls_ca is None):
        raise ConfigError("--tls-cert and --tls-key must be given together, and with --tls-ca; add what is missing")
    config = ChannelConfig(
        token_file=token_file, ca=tls_ca, certificate=tls_cert, private_key=tls_key, insecure=insecure
    )
    is_live = sys.stdout.isatty() and not once and not as_json
    try:
        return asyncio.run(_watch(servers, config, interval_s, is_live=is_live, is_once=once, as_json=as_json))
    except KeyboardInterrupt:
        return failures.DONE


async def _watch(
    servers: list[str], config: "ChannelConfig", interval_s: float, *, is_live: bool, is_once: bool, as_json: bool
) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    looks = _looks(servers, config, interval_s)
    before = await anext(looks)
    with Live(console=console, auto_refresh=False, screen=False) if is_live else contextlib.nullcontext() as live:
        if live is not None:
            live.update(shown(*_rates(None, before)), refresh=True)
        async for now in looks:
            rates = _rates(before, now)
            if live is not None:
                live.update(shown(*rates), refresh=True)
            elif as_json:
                write_json(_document(*rates))
            else:
                console.print(shown(*rates))
            before = now
            if is_once or not (is_live or as_json):
                return failures.FAILED if any(seen.error for seen in now) else failures.DONE
    return failures.DONE


async def _looks(servers: list[str], config: "ChannelConfig", interval_s: float) -> AsyncIterator[list["Seen"]]:
    """Yield a look at all servers, again and again, as close to every interval as they answer."""
    from mfdist.table_server.channel import client_channel
    from mfdist.table_server.watching import look

    deadline_s = max(2.0, interval_s)
    async with contextlib.AsyncExitStack() as stack:
        channels = [(server, await stack.enter_async_context(client_channel(server, config))) for server in servers]
        due = time.monotonic()
        while True:
            yield await asyncio.gather(*(look(server, channel, deadline_s) for server, channel in channels))
            due = max(due + interval_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())


def _rates(before: list["Seen"] | None, now: list["Seen"]) -> tuple[list[ServerRates], list[TableRates]]:
    pairs = [(None if before is None else before[index], seen) for index, seen in enumerate(now)]
    return [server_rates(*pair) for pair in pairs], [rates for pair in pairs for rates in table_rates(*pair)]


def _document(servers: list[ServerRates], tables: list[TableRates]) -> dict[str, Any]:
    described = []
    for server in servers:
        latency = {method: {"p50": half, "p99": most} for method, (half, most) in server.latency_s.items()}
        described.append({**asdict(server), "latency_s": latency})
    return {"servers": described, "tables": [asdict(table) for table in tables]}

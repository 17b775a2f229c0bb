"""`mfdist serve`: run a table server."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mfdist.errors import ConfigError
from mfdist.launch.cli import failures, wording
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.keys import as_toml


def serve(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.toml", help="Settings, also those that have no option; --keys prints them all."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the server's log and checkpoints.")
    ] = None,
    peer: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The other server of a pair, which holds the same rows.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Where Prometheus may read metrics.")
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that --init-tls made: its server certificate and tokens are used."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on any address without TLS and tokens.")] = False,
    init_tls: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Make certificates and tokens for a trial in a new folder, and end."),
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="With --init-tls: a name or address of the servers; repeatable."),
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Print a CONFIG.toml with every key, its default and its meaning, and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> int:
    """Hold tables in memory and serve them over gRPC until SIGTERM; what it acknowledged survives its death.

    Example: mfdist serve --data /var/lib/mfdist/0 --listen 127.0.0.1:7070

    Example: mfdist serve --data /var/lib/mfdist/0 --listen 127.0.0.1:7070 --peer 127.0.0.1:7071

    Example: mfdist serve --init-tls tls --host tables-0.example.org

    Example: mfdist serve --tls tls --data /var/lib/mfdist/0 --listen 0.0.0.0:7070

    The first line on stdout is the address, once calls are taken. Any number of servers hold a model's tables together;
    each needs a folder of its own.
    """
    if keys:
        return _show_keys()
    if init_tls is not None:
        return _init_tls(init_tls, hosts or [], as_json=as_json)
    if hosts:
        raise ConfigError(f"--host goes with --init-tls; got {hosts[0]}; where to listen is --listen")
    from mfdist import idle_threads

    idle_threads.sleep()
    from mfdist.table_server.config import load_server_config
    from mfdist.table_server.server import serve as run

    loaded = load_server_config(config)
    trial = {"certificate": "server.pem", "private_key": "server.key", "token_file": "tokens.toml"} if tls else {}
    given: dict[str, dict[str, Any]] = {
        "server": {"listen": listen, "data": data},
        "replication": {"peer": peer},
        "metrics": {"listen": metrics},
        "security": {"insecure": insecure or None, **{key: tls / name for key, name in trial.items() if tls}},
    }
    sections = {
        name: getattr(loaded, name).model_copy(update={key: value for key, value in keys.items() if value is not None})
        for name, keys in given.items()
    }
    chosen = loaded.model_copy(update=sections)

    def say(address: str, metrics_address: str | None) -> None:
        if as_json:
            write_json({"address": address, "metrics": metrics_address, "data": str(chosen.server.data)})
        else:
            typer.echo(address)
        sys.stdout.flush()

    run(chosen, say)
    return failures.DONE


def _show_keys() -> int:
    from mfdist.table_server.config import ServerConfig

    for line in as_toml(ServerConfig):
        typer.echo(line)
    return failures.DONE


def _init_tls(folder: Path, hosts: list[str], *, as_json: bool) -> int:
    from mfdist.table_server.certificates import init_tls

    paths = init_tls(folder, hosts)
    if as_json:
        write_json({"files": [str(path) for path in paths]})
        return failures.DONE
    for path in paths:
        typer.echo(str(path))
    typer.echo(f"servers: mfdist serve --tls {wording.quoted(folder)} --data DIR --listen 0.0.0.0:7070")
    typer.echo(f"clients: {wording.quoted(folder / 'ca.pem')} and one of the tokens; keep ca.key away from both")
    return failures.DONE

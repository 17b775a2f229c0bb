"""`mfdist bench server`: a table server beside what gRPC alone moves and beside the local lookup."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json


def bench_server(
    folder: Annotated[Path, typer.Option("--dir", help="A folder on the disk that a log is to be on.")] = Path(),
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of pushes with a log and without.")] = 7,
    memory: Annotated[
        float, typer.Option("--memory", metavar="SECONDS", min=0.0, help="Watch memory under full load for so long.")
    ] = 0.0,
    json_file: JsonFile = None,
) -> int:
    """Time lookups and pushes of a server in a process of its own, on loopback.

    Example: mfdist bench server --seconds 10 --memory 600 --json server.json

    Sums and rows are compared first. Shares are of the speed of the same bytes through a gRPC server that does nothing,
    and of the local lookup, in the same turns.
    """
    if not folder.is_dir():
        raise ConfigError(f"--dir must be a folder that is there; got {folder}")
    from mfdist.table_server.benchmark import measure_load, measure_log, measure_lookups, measure_memory

    typer.echo(f"{'lookup':<12}{'server':>12}{'gRPC alone':>12}{'local':>12}{'of gRPC':>9}{'of local':>9}")
    lookups = []
    for result in measure_lookups(seconds):
        lookups.append(result)
        times = "".join(f"{each * 1e3:>9.2f} ms" for each in (result.server_s, result.grpc_s, result.local_s))
        typer.echo(f"{result.case:<12}{times}{result.share_of_grpc:>9.2f}{result.share_of_local:>9.2f}")
    load = measure_load(seconds)
    typer.echo(
        f"64 tokens: {load.requests_per_s:.0f} requests/s; at half of that p50 {load.p50_s * 1e3:.2f} ms, p99 "
        f"{load.p99_s * 1e3:.2f} ms ({load.p99_s / load.p50_s:.1f} ×); memory {load.memory_growth:+.1%} at full load"
    )
    log = measure_log(folder, rounds)
    typer.echo(
        f"pushes of {log.push_bytes / 1e3:.0f} kB, 32 in flight: {log.logged_per_s:.0f}/s on disk, "
        f"{log.unlogged_per_s:.0f}/s without a log; it costs {log.cost:.0%}"
    )
    held = measure_memory(folder, memory) if memory else None
    if held is not None:
        typer.echo(
            f"memory: {held.drift:+.1%} in {held.seconds:.0f} s of {held.requests_per_s:.0f} lookups/s and "
            f"{held.pushes_per_s:.0f} pushes/s; {held.first_bytes / 1e6:.0f} MB to {held.last_bytes / 1e6:.0f} MB, "
            f"from {held.least_bytes / 1e6:.0f} to {held.most_bytes / 1e6:.0f} on the way"
        )
    if json_file is not None:
        document = {
            "machine": {"cpu": machine.cpu(), "disk": machine.disk(folder)},
            "versions": machine.versions(),
            "lookups": [asdict(result) for result in lookups],
            "load": asdict(load),
            "log": asdict(log),
            "memory": None if held is None else asdict(held),
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    return failures.DONE

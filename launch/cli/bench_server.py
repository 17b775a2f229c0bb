"""`mfdist bench server`: a table server beside what gRPC alone moves and beside the local lookup."""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json
from mfdist.launch.cluster import check_installed

if TYPE_CHECKING:
    from mfdist.table_server.contest import ContestResult


def bench_server(
    folder: Annotated[Path, typer.Option("--dir", help="A folder on the disk that a log is to be on.")] = Path(),
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of pushes with a log and without.")] = 7,
    memory: Annotated[
        float, typer.Option("--memory", metavar="SECONDS", min=0.0, help="Watch memory under full load for so long.")
    ] = 0.0,
    ray: Annotated[
        int,
        typer.Option(
            "--ray",
            metavar="STARTS",
            min=0,
            help="Start a server, and a Ray actor with an nn.EmbeddingBag, so many times each, and compare them.",
        ),
    ] = 0,
    json_file: JsonFile = None,
) -> int:
    """Time lookups and pushes of a server in a process of its own, on loopback.

    Example: mfdist bench server --seconds 10 --memory 600 --json server.json

    Example: mfdist bench server --ray 5

    Sums and rows are compared first. Shares are of the speed of the same bytes through a gRPC server that does nothing,
    and of the local lookup, in the same turns. --ray starts a Ray of its own: an actor as Ray makes it, which has one
    thread (OMP_NUM_THREADS=1); one that asks for all cores, which a server takes anyway; one called with numpy arrays.
    """
    if not folder.is_dir():
        raise ConfigError(f"--dir must be a folder that is there; got {folder}")
    if ray:
        check_installed("mfdist bench server --ray")
    from mfdist import idle_threads

    idle_threads.sleep()  # or threads of the local lookup would spin while the next call wants their cores
    from mfdist.table_server.benchmark import measure_load, measure_log, measure_lookups, measure_memory
    from mfdist.table_server.benchmark_others import said_of

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
    if disturbed := said_of([*(result.other_cores for result in lookups), load.other_cores, log.other_cores]):
        typer.echo(disturbed)
    held = measure_memory(folder, memory) if memory else None
    if held is not None:
        typer.echo(
            f"memory: {held.drift:+.1%} in {held.seconds:.0f} s of {held.requests_per_s:.0f} lookups/s and "
            f"{held.pushes_per_s:.0f} pushes/s; {held.first_bytes / 1e6:.0f} MB to {held.last_bytes / 1e6:.0f} MB, "
            f"from {held.least_bytes / 1e6:.0f} to {held.most_bytes / 1e6:.0f} on the way"
        )
    contest = _beside_ray(ray, seconds) if ray else None
    if json_file is not None:
        document = {
            "machine": {"cpu": machine.cpu(), "disk": machine.disk(folder)},
            "versions": machine.versions(),
            "lookups": [asdict(result) for result in lookups],
            "load": asdict(load),
            "log": asdict(log),
            "memory": None if held is None else asdict(held),
            "contest": None if contest is None else [asdict(result) for result in contest],
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    return failures.DONE


def _beside_ray(starts: int, seconds: float) -> list["ContestResult"]:
    from mfdist.launch.ray_contender import ray_contenders
    from mfdist.table_server.benchmark_others import said_of
    from mfdist.table_server.contest import measure_contest

    with ray_contenders() as others:
        results = measure_contest(others, starts, seconds)
    typer.echo(
        f"{'64 tokens, 8 at once':<24}{'threads':>8}{'requests/s':>12}{'of starts':>15}{'times as fast':>20}"
        f"{'kB a request':>14}{'fewer bytes':>13}"
    )
    for number, result in enumerate(results):
        rates, fast = result.requests_per_s, result.times_as_fast
        line = f"{result.contender:<24}{result.num_threads:>8}{result.median_per_s:>12.0f}"
        line += f"{f'{min(rates):.0f} to {max(rates):.0f}':>15}"
        ratio = f"{statistics.median(fast):.1f} ({min(fast):.1f} to {max(fast):.1f})" if number else ""
        line += f"{ratio:>20}{(result.request_bytes + result.reply_bytes) / 1e3:>14.0f}"
        typer.echo((line + (f"{f'{result.bytes_ratio:.1f} ×':>13}" if number else "")).rstrip())
    if disturbed := said_of(each for result in results for each in result.other_cores):
        typer.echo(disturbed)
    return results

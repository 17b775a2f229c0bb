"""`mfdist bench size`: how large a table one device trains, and how fast beside a small one."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.table_size import SizeSpeed


def bench_size(
    sizes: Annotated[
        list[str] | None, typer.Option("--size", metavar="SIZE", help="Of a table's rows, such as 70GB; 2GB and 4GB.")
    ] = None,
    row_dim: Annotated[int, typer.Option(min=1, help="Columns.")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="Of a step.")] = 16384,
    lookups: Annotated[int, typer.Option(min=1, help="Of a token.")] = 128,
    turns: Annotated[int, typer.Option(min=1, help="Steps that are timed; medians are reported.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    at_least: Annotated[
        float | None, typer.Option(metavar="RATIO", help="Fail unless the last has so much of the first's bytes/s.")
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Train tables of several sizes on random rows: bf16, row-wise Adagrad in backward.

    Example: mfdist bench size --size 2GB --size 70GB --at-least 0.9

    Example: mfdist bench size --size 100MB --size 4GB --tokens 1024 --device cpu

    Sums and updated rows are compared with float64 first; where they are wrong the exit code is 1.
    "Spread" is how far apart the quartiles of a step's times are.
    """
    asked = [quantities.parse_bytes(size) for size in sizes or ("2GB", "4GB")]
    if too_small := [size for size in asked if size < 2 * row_dim]:
        raise ConfigError(f"a table must have a row, of {2 * row_dim} bytes here; got {too_small[0]} bytes")
    import torch

    from mfdist.benchmarks.table_size import measure_sizes
    from mfdist.training.device import choose_device, describe_device

    where = choose_device(device)
    typer.echo(
        f"{describe_device(where)}, torch {torch.__version__}, {tokens:,} tokens × {lookups} lookups of {row_dim}"
    )
    typer.echo(
        f"{'rows':>10}{'table':>11}{'lookup':>11}{'GB/s':>8}{'step':>11}{'spread':>8}{'GB/s':>8}{'peak':>11}{'error':>9}"
    )
    found: list[SizeSpeed] = []
    too_large = ""
    try:
        for speed in measure_sizes(asked, where, row_dim=row_dim, num_tokens=tokens, num_lookups=lookups, turns=turns):
            found.append(speed)
            typer.echo(_line(speed))
    except MemoryError as error:
        too_large = f"tables must fit into memory; {error}; give a smaller --size"
    ratio = found[-1].step_bytes_per_s / found[0].step_bytes_per_s if found else 0.0
    if not too_large:
        typer.echo(f"the last one's steps move {ratio:.2f} of the first one's bytes a second")
    if json_file is not None:
        document = {
            "machine": {"cpu": machine.cpu(), "gpus": machine.gpus()},
            "versions": machine.versions(),
            "num_tokens": tokens,
            "num_lookups": lookups,
            "results": [asdict(speed) for speed in found],
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    if too_large:
        return failures.fail(too_large)
    if wrong := [speed for speed in found if speed.is_wrong]:
        return failures.fail(f"sums and rows must be float64's within bf16; error {wrong[0].error:.2g}")
    if at_least is not None and ratio < at_least:
        return failures.fail(f"the last table must have {at_least:g} of the first one's bytes/s; got {ratio:.2f}")
    return failures.DONE


def _line(speed: "SizeSpeed") -> str:
    peak = "" if speed.peak_bytes is None else quantities.num_bytes(speed.peak_bytes)
    spread = "" if math.isnan(speed.step_spread) else f"{speed.step_spread:.0%}"
    return (
        f"{quantities.count(speed.num_rows):>10}{quantities.num_bytes(speed.table_bytes):>11}"
        f"{speed.forward_s * 1e3:>8.2f} ms{speed.forward_bytes_per_s / 1e9:>8.0f}"
        f"{speed.step_s * 1e3:>8.2f} ms{spread:>8}{speed.step_bytes_per_s / 1e9:>8.0f}{peak:>11}{speed.error:>9.1e}"
    )

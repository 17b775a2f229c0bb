"""`mfdist bench layers`: one memory layer beside the linear layer it replaces, over numbers of tokens."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.bench import chosen_device
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.layers import LayerSpeed

_WIDTHS = (512, 1024, 2048)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_SECONDS = 0.5

HEADER = (
    f"{'layer':<14}{'tokens':>8}{'MemoryLayer':>15}{'spread':>8}{'nn.Linear':>15}{'spread':>8}{'times as fast':>15}"
)


def bench_layers(
    widths: Annotated[
        list[int] | None, typer.Option("--width", min=8, metavar="D", help="Features in and out; 512, 1024 and 2048.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, metavar="N", help="Tokens of a call; 1, 4, 16 … 4096.")
    ] = None,
    bits: Annotated[int, typer.Option(min=1, max=16, help="Bits of the memory layer.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, of weights, rows and activations.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads, all by default; with 1, times are processor time, right on a busy CPU."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time spent on each layer at each number.")] = _SECONDS,
    json_file: JsonFile = None,
) -> int:
    """Time a memory layer and nn.Linear over numbers of tokens, and say up to how many the memory layer is ahead.

    Example: mfdist bench layers --threads 1

    Example: mfdist bench layers --device cuda --dtype bf16 --width 1024 --width 4096

    --width and --tokens may be given several times. Both layers are compared with float64 first; where one is wrong the
    exit code is 1.
    """
    import torch

    from mfdist.benchmarks.layers import crossover, measure_layers
    from mfdist.benchmarks.lookup_case import FLOATS

    device = chosen_device(device)
    if dtype not in FLOATS:
        raise ConfigError(f'--dtype must be {" or ".join(FLOATS)}; got "{dtype}"')
    if threads is not None:
        torch.set_num_threads(threads)
    name = machine.gpus()[0]["name"] if device == "cuda" else machine.cpu()["name"]
    typer.echo(
        f"{name}, torch {torch.__version__}, {quantities.threads(torch.get_num_threads())}, {dtype}, {bits} bits"
    )
    typer.echo(HEADER)
    found: list[LayerSpeed] = []
    for width in sorted(set(widths or _WIDTHS)):
        speeds = []
        measured = measure_layers(
            width, width, sorted(set(tokens or _TOKENS)), bits=bits, dtype=FLOATS[dtype], device=device, seconds=seconds
        )
        for speed in measured:
            speeds.append(speed)
            typer.echo(line(speed))
        typer.echo(f"{width} → {width}: {_told(crossover(speeds), speeds[-1].num_tokens)}")
        found += speeds
    if json_file is not None:
        document = {
            "machine": {"device": device, "name": name, "threads": torch.get_num_threads(), "cpu": machine.cpu()},
            "versions": machine.versions(),
            "bits": bits,
            "dtype": dtype,
            "results": [{**asdict(speed), "ratio": speed.ratio} for speed in found],
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    wrong = [f"{each.in_features} → {each.out_features} for {each.num_tokens}" for each in found if each.is_wrong]
    if wrong:
        return failures.fail(f"every result must be right; wrong were {', '.join(wrong)}")
    return failures.DONE


def line(speed: "LayerSpeed") -> str:
    """Return what was found at one number of tokens as a line."""
    layer = f"{speed.in_features} → {speed.out_features}"
    times = (
        f"{speed.memory_us:>12.1f} µs{speed.memory_spread:>8.1%}{speed.linear_us:>12.1f} µs{speed.linear_spread:>8.1%}"
    )
    return f"{layer:<14}{speed.num_tokens:>8}{times}{speed.ratio:>15.2f}{'  WRONG' if speed.is_wrong else ''}"


def _told(tokens: float | None, most: int) -> str:
    if tokens is None:
        return f"the memory layer is ahead up to {most} tokens, the most that were measured"
    if tokens == 0:
        return "nn.Linear is ahead from the first number of tokens on"
    return f"the memory layer is ahead up to about {tokens:.0f} tokens"

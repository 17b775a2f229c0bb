"""`mfdist bench training`: tokens a second, memory and the parts of a step, beside the dense twin."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import quantities
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.training import TrainingSpeed


def bench_training(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset, or a TOML file.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key for all, as in training.compile=true."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed; medians are reported.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    at_least: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="Fail unless the fastest MemoryFormer has so much of its twin's tokens/s."),
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Train a MemoryFormer and its dense twin for a few steps each, on random tokens, and compare their speed.

    Example: mfdist bench training tiny --set training.compile=true --at-least 0.6

    Example: mfdist bench training base --set training.batch_size=16 --json base.json

    Steps are those of `mfdist train`. A MemoryFormer is measured with the preset's rule for tables, and with rows in
    bf16 by row-wise Adagrad, and by Adam with moments in a byte each. "Spread" is how far apart the quartiles
    of a step's times are. "Bytes" are those of a table's parameter with its gradient and states. That the loss on the
    tokens falls is checked for each.
    """
    import torch

    from mfdist.benchmarks.training import measure_training
    from mfdist.training.device import choose_device, describe_device

    where = choose_device(device)
    typer.echo(f"{describe_device(where)}, torch {torch.__version__}, {config} {' '.join(settings or ())}")
    columns = f"{'tokens/s':>10}{'ms/step':>9}{'spread':>8}{'of twin':>9}{'peak':>10}{'bytes':>7}"
    typer.echo(f"{'':<42}{columns}  where the time goes")
    found: list[TrainingSpeed] = []
    for speed in measure_training(config, settings or (), where, steps=steps):
        found.append(speed)
        typer.echo(_line(speed))
    if json_file is not None:
        document = {
            "machine": {"cpu": machine.cpu(), "gpus": machine.gpus(), "threads": torch.get_num_threads()},
            "versions": machine.versions(),
            "preset": config,
            "settings": list(settings or ()),
            "results": [asdict(speed) for speed in found],
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    if wrong := [speed.contender for speed in found if speed.is_wrong]:
        return failures.fail(f"the loss on the same tokens must fall; it did not for {' and '.join(wrong)}")
    ratio = max((speed.ratio for speed in found[1:] if not speed.note), default=0.0)
    if at_least is not None and not ratio >= at_least:
        return failures.fail(f"the MemoryFormer must train at {at_least:g} of its twin's speed; got {ratio:.2f}")
    return failures.DONE


def _line(speed: "TrainingSpeed") -> str:
    if speed.note:
        return f"{speed.contender:<42}{speed.note}"
    peak = "" if speed.peak_memory_bytes is None else quantities.num_bytes(speed.peak_memory_bytes)
    size = "" if speed.table_bytes is None else f"{speed.table_bytes:.1f}"
    shares = ", ".join(
        f"{kind} {share:.0%}"
        for kind, share in sorted(speed.shares.items(), key=lambda item: -item[1])
        if share > 0.005
    )
    spread = "" if math.isnan(speed.spread) else f"{speed.spread:.0%}"
    rate = quantities.count(speed.tokens_per_s)
    figures = f"{rate:>10}{speed.step_s * 1e3:>9.1f}{spread:>8}{speed.ratio:>9.2f}{peak:>10}{size:>7}"
    return f"{speed.contender:<42}{figures}  {shares}"

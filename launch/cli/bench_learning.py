"""`mfdist bench learning`: does a MemoryFormer learn as well as its dense twin, and which settings matter?"""

import time
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.learning import Gap, Learned


def bench_learning(
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the runs; what has finished there is kept.")
    ] = None,
    preset: Annotated[str, typer.Option(help="A preset, or a TOML file, that all variants start from.")] = "tiny",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Variants, such as memory or twin-*; by default the first four."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,N,…", help="Seeds of initialisation and batches.")] = "0,1,2",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key for all variants.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Begin no run after so long.")] = None,
    at_least: Annotated[
        float | None, typer.Option(metavar="NATS", help="Fail unless the MemoryFormer is so far ahead of its twin.")
    ] = None,
    json_file: JsonFile = None,
    is_listed: Annotated[bool, typer.Option("--list", help="List the variants and train nothing.")] = False,
) -> int:
    """Train a MemoryFormer and its dense twin on the same text, tokens, batches and schedule, and compare.

    Example: mfdist bench learning --out runs/learning --set data.source=~/corpus --at-least 0.3

    Example: mfdist bench learning --out runs/learning --only 'extra-bits-*' --only memory --seeds 0 --minutes 8

    Validation loss is told against tokens, FLOPs and seconds of training; "ahead" is by how many nats a token the
    memory is below a twin. The twin has one learning rate, the best, or a higher one for its embedding as well, as
    the MemoryFormer has, or more decay besides; --at-least is asked of the best of them. A run whose loss is not finite
    is told and compared with nothing. A bench that was cut short goes on where it was.
    """
    import torch

    from mfdist.benchmarks.learning import VARIANTS, gaps, measure
    from mfdist.config import load_config
    from mfdist.training.device import choose_device, describe_device

    chosen = [each for each in VARIANTS if any(fnmatch(each.name, one) for one in only or _MAIN)]
    if is_listed:
        for each in VARIANTS:
            typer.echo(f"{each.name:<34}{each.question:<18}{_changes(each.settings)}")
        return failures.DONE
    if out is None:
        raise ConfigError("a bench must have a folder for its runs; got none; give --out FOLDER")
    if not chosen:
        raise ConfigError(f"--only must name variants; got {', '.join(only or ())}; see mfdist bench learning --list")
    numbers = _seeds(seeds)
    trained_on = load_config(preset, settings or ()).training.device
    here = describe_device(choose_device(trained_on))
    began = time.monotonic()

    def may_begin() -> bool:
        return minutes is None or time.monotonic() - began < minutes * 60

    found: list[Learned] = []
    typer.echo(f"{here}, torch {torch.__version__}, {preset} {' '.join(settings or ())}")
    typer.echo(_HEADER)
    try:
        for learned in measure(out, preset, chosen, numbers, settings or (), may_begin=may_begin, tell=_said):
            found.append(learned)
            typer.echo(_line(learned) + (f"  on {learned.device}" if learned.device != here else ""))
    finally:
        if json_file is not None:
            document = {
                "machine": {"cpu": machine.cpu(), "gpus": machine.gpus()},
                "versions": machine.versions(),
                "preset": preset,
                "settings": list(settings or ()),
                "results": [asdict(learned) for learned in found],
            }
            json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    missing = len(chosen) * len(numbers) - len(found)
    if missing:
        typer.echo(
            f"{missing} runs are missing, for want of time or because the bench was told to stop; the same command "
            "goes on with them"
        )
    ended = [learned for learned in found if learned.note]
    ahead = gaps(found)
    for one in ahead:
        typer.echo(_told(one))
    # Without all of its runs, the better twin may be the one that is missing.
    if at_least is not None and (missing or not ahead or ahead[0].at_tokens < at_least):
        got = f"got {ahead[0].at_tokens:.3f} for {ahead[0].twin}" if ahead else "--only must name memory and a twin"
        got = f"{ended[0].variant} ended early" if not ahead and ended else got
        got = "not all of them were trained" if missing else got
        return failures.fail(f"the MemoryFormer must be ahead of its twin by {at_least:g} nats a token; {got}")
    return failures.DONE


_MAIN = ("memory", "twin-2e-3", "twin-2e-3-embedding-10", "twin-2e-3-embedding-10-decay-0.5")
_HEADER = (
    f"{'variant':<34}{'seed':>5}{'loss after a quarter, half, …':>34}{'bits/byte':>11}{'tokens/s':>11}"
    f"{'GFLOPs/token':>14}{'seconds':>9}{'GB':>7}"
)


def _said(line: str) -> None:
    typer.echo(line, err=True)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"--seeds takes numbers, such as 0,1,2; got {text}")
    if len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds must be different numbers; got {text}; name each once")
    return [int(part) for part in parts]


def _changes(settings: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "the preset as it is"


def _line(learned: "Learned") -> str:
    if learned.note:
        return f"{learned.variant:<34}{learned.seed:>5}  {'; '.join(learned.note.split('; ')[:2])}"
    points, last = learned.points, learned.points[-1]
    quarters = [min(points, key=lambda point: abs(point.tokens - last.tokens * part / 4)) for part in (1, 2, 3)]
    losses = " ".join(f"{point.loss:.3f}" for point in (*quarters, last))
    return (
        f"{learned.variant:<34}{learned.seed:>5}{losses:>34}{last.bits_per_byte:>11.4f}{learned.tokens_per_s:>11,.0f}"
        f"{last.flops / last.tokens / 1e9:>14.3g}{last.seconds:>9.1f}{learned.peak_memory_bytes / 1e9:>7.2f}"
    )


def _told(ahead: "Gap") -> str:
    at_seconds = "no validation came so early" if ahead.at_seconds is None else f"by {ahead.at_seconds:+.3f}"
    seeds = "one seed each" if ahead.spread is None else f"seeds differ by up to {ahead.spread:.3f}"
    return (
        f"the MemoryFormer is ahead of {ahead.twin} by {ahead.at_tokens:+.3f} nats a token at equal tokens; at equal "
        f"seconds {at_seconds}; {seeds}"
    )

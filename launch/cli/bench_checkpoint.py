"""`mfdist bench checkpoint`: how fast a disk takes and gives back checkpoints, beside torch's own and a plain file."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.checkpoint import Outcome
    from mfdist.benchmarks.checkpoint_stall import Stall


def bench_checkpoint(
    folder: Annotated[Path, typer.Option("--dir", help="A folder on the disk to measure.")] = Path(),
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the checkpoint, rounded up to whole tables.")] = 576,
    ranks: Annotated[str, typer.Option(metavar="N,N,…", help="How many processes save together.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each contender takes; medians are reported.")] = 7,
    json_file: JsonFile = None,
) -> int:
    """Save and load a checkpoint, beside torch.distributed.checkpoint and one plain file, all of them fsynced.

    Example: mfdist bench checkpoint --dir runs --megabytes 2000

    Loads are cold. Shares are of the plain file's speed, what `dd conv=fsync` would show, in the same round. Then a
    save in the background is measured: how long training stands still for it, beside a copy of the same memory, and how
    much longer its steps take meanwhile, for steps of one thread and of all.
    """
    sizes = _sizes(ranks)
    if not folder.is_dir():
        raise ConfigError(f"--dir must be a folder that is there; got {folder}")
    from mfdist.benchmarks.checkpoint import measure, scratch_folder
    from mfdist.benchmarks.checkpoint_stall import measure_stall

    found: list[Outcome] = []
    num_bytes = megabytes * 1_000_000
    typer.echo(f"{'ranks':<7}{'':<6}{'impl':<9}{'median':>10}{'GB/s':>8}{'of file':>9}")
    for outcome in measure(folder, num_bytes=num_bytes, num_ranks=sizes, rounds=rounds):
        found.append(outcome)
        typer.echo(_line(outcome))
    scratch = scratch_folder(folder)
    stalls: list[Stall] = []
    try:
        for stall in measure_stall(scratch, num_bytes=num_bytes, rounds=rounds):
            stalls.append(stall)
            typer.echo(_told(stall))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if json_file is not None:
        document = {
            "machine": {"cpu": machine.cpu(), "disk": machine.disk(folder)},
            "versions": machine.versions(),
            "results": [asdict(outcome) for outcome in found],
            "background": [asdict(stall) for stall in stalls],
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    return failures.DONE


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--ranks takes numbers of processes, such as 1,2; got {text}")
    return [int(part) for part in parts]


def _line(outcome: "Outcome") -> str:
    seconds = outcome.num_bytes / outcome.bytes_per_s
    return (
        f"{outcome.num_ranks:<7}{outcome.act:<6}{outcome.contender:<9}{seconds * 1e3:>7.0f} ms"
        f"{outcome.bytes_per_s / 1e9:>8.2f}{outcome.share_of_file:>9.2f}"
    )


def _told(stall: "Stall") -> str:
    return (
        f"in the background, steps of {quantities.threads(stall.num_threads)}: training stands still for "
        f"{stall.stall_s * 1e3:.0f} ms, a copy of the memory takes {stall.copy_s * 1e3:.0f} ms, the save "
        f"{stall.save_s * 1e3:.0f} ms; meanwhile a step takes {stall.step_while_saving_s / stall.step_s:.2f} times as "
        "long"
    )

"""`mfdist evaluate`: score a run on the text it was not trained on."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mfdist.launch.cli.display import showing
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.progress import RunProgress


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="The checkpoint to take; default: the last.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")] = False,
) -> None:
    """Score a run on all of its validation text, beside two n-gram models of the same text.

    Example: mfdist evaluate runs/demo --json
    """
    # torch comes with these.
    from mfdist.training.evaluation import evaluate_run
    from mfdist.training.run import RunDirectory

    directory = RunDirectory.open(run)
    with showing(sys.stderr, RunProgress()) as observer:
        report = evaluate_run(directory, step, observer)
    if as_json:
        scores = {"loss": report.loss, "bits_per_byte": report.bits_per_byte, "num_tokens": report.num_tokens}
        baselines = dict(report.baselines_bits_per_byte)
        write_json({"run_dir": str(run), "step": report.step, **scores, "baselines_bits_per_byte": baselines})
        return
    rows = [(f"step {report.step}", report.bits_per_byte), *report.baselines_bits_per_byte.items()]
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{report.num_tokens:,} validation tokens, loss {report.loss:.3f} nats a token")
    for name, score in rows:
        typer.echo(f"{name:<{width}}  {score:.3f} bits per byte")

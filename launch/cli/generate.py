"""`mfdist generate`: write text with a trained model, as it comes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mfdist.launch import quantities
from mfdist.launch.cli.json_output import write_json


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text to continue; - reads it from stdin.", show_default=False)
    ],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write.")] = 50,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="The same seed writes the same text.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="K", help="Choose among the K likeliest; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Choose among those that make up P.")
    ] = 1.0,
    step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="The checkpoint to take; default: the last.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document instead of streaming.")] = False,
) -> None:
    """Write text with a trained model.

    Example: mfdist generate runs/demo --prompt "def " --tokens 50
    """
    # torch comes with these.
    from mfdist.training.generation import GenerationConfig, load_generator
    from mfdist.training.run import RunDirectory

    text = sys.stdin.read() if prompt == "-" else prompt
    config = GenerationConfig(num_tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    generator = load_generator(RunDirectory.open(run), step)
    pieces = generator.stream(text, config)
    if as_json:
        settings = {"num_tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        write_json({"run_dir": str(run), "step": generator.step, **settings, "prompt": text, "text": "".join(pieces)})
        return
    _write(text)
    for piece in pieces:
        _write(piece)
    _write("\n")


def _write(text: str) -> None:
    # A pipe gets the model's exact text; on a terminal it must not be able to move the cursor or worse.
    sys.stdout.write(quantities.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()

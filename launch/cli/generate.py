"""`mfdist generate`: write text with a trained model, as it comes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch.cli.json_output import write_json

if TYPE_CHECKING:
    from mfdist.training.generation import Generator


def generate(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, or a folder with a model of transformers.", show_default=False),
    ],
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
    map_tables: Annotated[
        bool, typer.Option("--map-tables", help="Leave the tables in their files: only rows that are read take memory.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads; default: what torch takes.")
    ] = None,
    against_twin: Annotated[
        bool, typer.Option("--against-twin", help="Also time the dense twin of this shape, and tell both speeds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document instead of streaming.")] = False,
) -> None:
    """Write text with a trained model.

    Example: mfdist generate runs/demo --prompt "def " --tokens 50

    Example: mfdist generate runs/demo --prompt "def " --map-tables --against-twin

    A folder that `mfdist checkpoint export --format hf` wrote, or one with a Pythia checkpoint, takes a run's place;
    its tables always stay in its files.
    """
    import torch

    from mfdist.training.generation import GenerationConfig

    if threads is not None:
        torch.set_num_threads(threads)
    text = sys.stdin.read() if prompt == "-" else prompt
    config = GenerationConfig(num_tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    generator = _generator(run, step, map_tables)
    pieces = generator.stream(text, config)
    if as_json:
        settings = {"num_tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        written = {"run_dir": str(run), "step": generator.step, **settings, "prompt": text, "text": "".join(pieces)}
        write_json(written | (_speeds(generator) if against_twin else {}))
        return
    _write(text)
    for piece in pieces:
        _write(piece)
    _write("\n")
    if against_twin:
        speeds = _speeds(generator)
        typer.echo(
            f"{speeds['tokens_per_s']:.1f} tokens/s; its dense twin {speeds['twin_tokens_per_s']:.1f}, so "
            f"{speeds['times_the_twin']:.2f} times as fast, on {quantities.threads(speeds['threads'])}",
            err=True,
        )


def _generator(path: Path, step: int | None, map_tables: bool) -> "Generator":
    """Return what writes: a run's step, or the model in a folder of Hugging Face's kind."""
    from mfdist.hugging_face.folder import is_model_folder, load_folder
    from mfdist.training.generation import Generator, load_generator
    from mfdist.training.run import RunDirectory

    if (path / "config.toml").is_file() or not is_model_folder(path):
        return load_generator(RunDirectory.open(path), step, map_tables=map_tables)
    if step is not None:
        raise ConfigError(f"--step is for runs; {path} is one model; leave it out")
    loaded = load_folder(path)
    if loaded.tokenizer is None:
        raise ConfigError(f"a model's folder must have a tokenizer.json to write text with; {path} has none")
    return Generator(loaded.model, loaded.tokenizer)


def _speeds(generator: "Generator") -> dict[str, Any]:
    """Return how fast the model and its dense twin write a token after another."""
    import torch

    from mfdist.benchmarks.decoding import dense_twin, measure_decoding

    model = generator.model
    found = measure_decoding({"twin": dense_twin(model), "model": model})
    return {
        "tokens_per_s": found["model"].tokens_per_s,
        "twin_tokens_per_s": found["twin"].tokens_per_s,
        "times_the_twin": found["model"].ratio,
        "threads": torch.get_num_threads(),
    }


def _write(text: str) -> None:
    # A pipe gets the model's exact text; on a terminal it must not be able to move the cursor or worse.
    sys.stdout.write(quantities.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()

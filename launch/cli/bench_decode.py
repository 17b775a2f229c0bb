"""`mfdist bench decode`: tokens a second of a MemoryFormer and of its dense twin, one token at a time."""

from dataclasses import asdict
from typing import Annotated

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.bench_layers import HEADER, line
from mfdist.launch.cli.json_output import JsonFile, to_json


def bench_decode(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset, or a TOML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value, as in model.num_layers=4.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads, all by default; with 1, times are processor time, right on a busy CPU."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each writes in a turn.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each takes; medians are reported.")] = 7,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, of all weights and rows.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Sequences written at once.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "cpu",
    distinct: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Layers with weights of their own; the others take theirs in turn."),
    ] = None,
    is_compiled: Annotated[bool, typer.Option("--compile", help="Compile both by torch.compile, on a GPU.")] = False,
    at_least: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="Fail unless the MemoryFormer has so much of its twin's tokens/s."),
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Let a model of random weights and its dense twin write, in turns; speed does not depend on weights.

    Example: mfdist bench decode tiny --threads 1

    Example: mfdist bench decode base --threads 1 --set model.hidden_dim=2048 --distinct 4

    Example: mfdist bench decode base --device cuda --dtype bf16 --batch 8 --compile

    One layer of each, by itself, comes after them; `mfdist bench layers` has more of that. A model whose vocabulary is
    its tokenizer's gets data.vocab_size tokens. "In turns" is the least and the most of any turn. Tables take all
    their memory; with --distinct, that of N layers.
    """
    import torch

    from mfdist.benchmarks.decoding import measure_decoding, random_model
    from mfdist.benchmarks.layers import measure_layers
    from mfdist.benchmarks.lookup_case import FLOATS
    from mfdist.config import load_config
    from mfdist.models import count
    from mfdist.training.device import choose_device, describe_device

    if dtype not in FLOATS:
        raise ConfigError(f'--dtype must be {" or ".join(FLOATS)}; got "{dtype}"')
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_config(config, tuple(overrides or ()))
    shape = loaded.model.model_copy(update={"vocab_size": loaded.model.vocab_size or loaded.data.vocab_size})
    shapes = {
        name: shape.model_copy(update={"kind": kind})
        for name, kind in (("dense twin", "dense"), ("MemoryFormer", "memory"))
    }
    where = choose_device(device)
    if is_compiled and where.type == "cpu":
        raise ConfigError("--compile needs --device cuda: on a CPU every token has another shape, compiled anew")
    models = {
        name: random_model(each, num_distinct=distinct, dtype=FLOATS[dtype], device=where.type)
        for name, each in shapes.items()
    }
    found = measure_decoding(models, batch=batch, num_tokens=tokens, rounds=rounds, is_compiled=is_compiled)
    name = machine.cpu()["name"] if where.type == "cpu" else "CUDA graphs"
    how = ", compiled" if is_compiled else ""
    typer.echo(f"{name}, {describe_device(where)}, torch {torch.__version__}, batch {batch}, {dtype}{how}")
    counts = {name: count(random_model(each, dtype=FLOATS[dtype], device="meta")) for name, each in shapes.items()}
    typer.echo(
        f"{'':<14}{'tokens/s':>10}{'ms/token':>10}{'of twin':>9}{'in turns':>12}{'read a token':>14}{'parameters':>12}"
    )
    for name, speed in found.items():
        turns = "–".join(f"{ratio:.2f}" for ratio in speed.ratio_range) if name != "dense twin" else ""
        read, size = counts[name].bytes_read_per_token, counts[name].num_parameters
        typer.echo(
            f"{name:<14}{speed.tokens_per_s:>10.1f}{1e3 / speed.tokens_per_s:>10.2f}{speed.ratio:>9.2f}{turns:>12}"
            f"{quantities.num_bytes(read):>14}{quantities.count(size):>12}"
        )
    typer.echo("one layer by itself:")
    typer.echo(HEADER)
    layers = [
        speed
        for outputs in (1, 3)
        for speed in measure_layers(
            shape.hidden_dim,
            outputs * shape.hidden_dim,
            (batch,),
            bits=shape.bits,
            dtype=FLOATS[dtype],
            device=where.type,
        )
    ]
    for layer in layers:
        typer.echo(line(layer))
    if json_file is not None:
        results = [
            {"contender": name, **asdict(speed), "bytes_read_per_token": counts[name].bytes_read_per_token}
            for name, speed in found.items()
        ]
        document = {
            "machine": {"cpu": machine.cpu(), "gpus": machine.gpus(), "threads": torch.get_num_threads()},
            "device": where.type,
            "batch": batch,
            "is_compiled": is_compiled,
            "versions": machine.versions(),
            "model": shapes["MemoryFormer"].model_dump(),
            "distinct_layers": distinct or shape.num_layers,
            "dtype": dtype,
            "results": results,
            "layers": [asdict(layer) for layer in layers],
        }
        json_file.write_text(to_json(document, indent=1) + "\n", "utf-8")
    if any(layer.is_wrong for layer in layers):
        return failures.fail("every layer's result must be float64's within its dtype; those marked WRONG are not")
    ratio = found["MemoryFormer"].ratio
    if at_least is not None and not ratio >= at_least:
        return failures.fail(f"the MemoryFormer must write at {at_least:g} of its twin's speed; got {ratio:.2f}")
    return failures.DONE

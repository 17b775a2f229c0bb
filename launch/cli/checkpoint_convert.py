"""`mfdist checkpoint export` and `import`: to and from safetensors and torch.distributed.checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from mfdist.errors import ConfigError
from mfdist.launch import quantities
from mfdist.launch.cli.checkpoint import described
from mfdist.launch.cli.checkpoint_path import AsJson, StepPath, find_step
from mfdist.launch.cli.json_output import write_json


def export_checkpoint(
    path: StepPath,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the export.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="safetensors or dcp (torch.distributed.checkpoint).")] = (
        "safetensors"
    ),
    is_weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave optimiser states out.")] = False,
    max_file: Annotated[str, typer.Option(metavar="SIZE", help="Begin a new safetensors file at this size.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Write a step, by default the last, for other libraries.

    Example: mfdist checkpoint export runs/demo --out demo-weights --weights-only

    Tensors keep their paths in the checkpoint as names, such as tables/blocks.0.qkv/weight. safetensors takes memory
    for a file, dcp for everything.
    """
    from mfdist.checkpoint.conversion import export_step

    info = find_step(path)
    max_file_bytes = quantities.parse_bytes(max_file)
    names = export_step(info.path, out, form, has_states=not is_weights_only, max_file_bytes=max_file_bytes)
    if as_json:
        write_json({**described(info), "out": str(out), "format": form, "tensors": names})
    else:
        typer.echo(f"step {info.step}: {len(names)} tensors written to {out}")


def import_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A .safetensors file or folder, or a dcp folder.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The folder of checkpoints, or an URL, to commit it to.")],
    step: Annotated[int | None, typer.Option(min=0, help="The step's number; that of the export by default.")] = None,
    table: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors to take as tables, such as '*.qkv.weight'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Commit tensors from another library as a step.

    Example: mfdist checkpoint import demo-weights --out imported

    Example: mfdist checkpoint import model.safetensors --out imported --table '*.table.weight'

    What mfdist exported comes back as it was. Of other files, tensors that fit a --table pattern become tables, all
    else dense tensors. A dcp folder is unpickled: import only what you trust.
    """
    from mfdist.checkpoint.conversion import import_step
    from mfdist.checkpoint.directory import CheckpointDirectory

    if not source.exists():
        raise ConfigError(f"PATH must be there to be imported; got {source}")
    info = import_step(source, CheckpointDirectory(out), step=step, tables=tuple(table or ()))
    if as_json:
        write_json(described(info))
    else:
        typer.echo(
            f"step {info.step}: {info.num_tables} tables, {quantities.num_bytes(info.num_bytes)}, in {info.path}"
        )

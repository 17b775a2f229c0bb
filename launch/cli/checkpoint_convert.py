"""`mfdist checkpoint export` and `import`: to and from what other libraries read and write."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch.cli.checkpoint import described
from mfdist.launch.cli.checkpoint_path import AsJson, StepPath, find_step
from mfdist.launch.cli.json_output import write_json

if TYPE_CHECKING:
    from mfdist.checkpoint.step_info import StepInfo

_FORMATS = ("safetensors", "hf", "dcp")


def export_checkpoint(
    path: StepPath,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the export.", show_default=False)],
    form: Annotated[
        str, typer.Option("--format", help="safetensors, hf (a folder for transformers) or dcp (torch's own).")
    ] = "safetensors",
    is_weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave optimiser states out.")] = False,
    max_file: Annotated[str, typer.Option(metavar="SIZE", help="Begin a new safetensors file at this size.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Write a step, by default the last, for other libraries.

    Example: mfdist checkpoint export runs/demo --out demo-weights --weights-only

    Example: mfdist checkpoint export runs/demo --out demo-hf --format hf

    Tensors keep their paths in the checkpoint as names, such as tables/blocks.0.qkv/weight. In the format hf they are
    a model of transformers with its tokenizer, weights alone; a dense model is written as GPT-NeoX. dcp takes memory
    for everything, the others for a file.
    """
    if form not in _FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(_FORMATS)}; got {form}")
    info = find_step(path)
    max_file_bytes = quantities.parse_bytes(max_file)
    if form == "hf":
        names = _export_model(path, info, out, max_file_bytes)
    else:
        from mfdist.checkpoint.conversion import export_step

        names = export_step(info.path, out, form, has_states=not is_weights_only, max_file_bytes=max_file_bytes)
    if as_json:
        write_json({**described(info), "out": str(out), "format": form, "tensors": names})
    else:
        typer.echo(f"step {info.step}: {len(names)} tensors written to {out}")


def _export_model(path: str, info: "StepInfo", out: Path, max_file_bytes: int) -> list[str]:
    """Write a model's folder with what a run has besides a checkpoint: its tokenizer, and tables that servers hold."""
    from mfdist.hugging_face import export_step
    from mfdist.training.data.tokenizer import load_tokenizer
    from mfdist.training.run import RunDirectory

    folders = [Path(path).absolute(), *Path(path).absolute().parents[:2]]  # PATH may be RUN/checkpoints/step-…
    run = next((RunDirectory(folder) for folder in folders if (folder / "config.toml").is_file()), None)
    if run is None or not run.tokenizer_path.is_file():
        raise ConfigError(f"--format hf needs a run, for its tokenizer; {path} is none, nor a step in one")
    tables = next((served.path for served in run.served_tables.steps() if served.step == info.step), None)
    tokenizer = load_tokenizer(run.tokenizer_path)
    return export_step(info.path, out, tokenizer, tables=tables, max_file_bytes=max_file_bytes)


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
    else dense tensors. A step that is there already is not replaced. A dcp folder is unpickled: import only what you
    trust.
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

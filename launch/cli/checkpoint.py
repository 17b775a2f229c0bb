"""`mfdist checkpoint`: list and verify the committed steps of a run."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfdist.errors import CheckpointError, ConfigError
from mfdist.launch import quantities
from mfdist.launch.cli import failures
from mfdist.launch.cli.display import showing
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Preparing, ignore

if TYPE_CHECKING:
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.step_info import StepInfo

app = typer.Typer(help="List and verify the checkpoints of a run.", no_args_is_help=False)

_Path = Annotated[Path, typer.Argument(metavar="PATH", help="A run, or one of its steps.", show_default=False)]
_AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")]


@app.command("list")
def list_steps(path: _Path, as_json: _AsJson = False) -> None:
    """List the committed steps of a run, oldest first.

    Example: mfdist checkpoint list runs/demo
    """
    _, steps = _open(path)
    if as_json:
        write_json({"path": str(path), "checkpoints": [_described(info) for info in steps]})
        return
    for info in steps:
        size = "DAMAGED" if info.damage else quantities.num_bytes(info.num_bytes)
        typer.echo(f"step {info.step:>9,}  {size:>9}  {info.created:<20}  {info.path}")
    if not steps:
        typer.echo(f"nothing is committed yet in {path}")


@app.command()
def verify(path: _Path, as_json: _AsJson = False) -> int:
    """Read every byte of a run's steps, or of one of them, and compare it with what was written.

    Example: mfdist checkpoint verify runs/demo

    Example: mfdist checkpoint verify runs/demo/checkpoints/step-000000400

    The exit code is 1 if anything is damaged; the other steps can still be used.
    """
    directory, steps = _open(path)
    if not steps:
        raise CheckpointError(f"there must be a committed step to verify; {path} has none")
    found: list[dict[str, Any]] = []
    for info in steps:
        try:
            damages = _verify(directory, info)
        except CheckpointError:
            if info.path.exists():
                raise
            continue  # a run that goes on has pruned it meanwhile
        found.append({**_described(info), "ok": not damages, "damages": damages})
        if not as_json:
            _show(info, damages)
    is_whole = all(step["ok"] for step in found)
    if as_json:
        write_json({"path": str(path), "ok": is_whole, "checkpoints": found})
    return failures.DONE if is_whole else failures.FAILED


def _open(path: Path) -> tuple["CheckpointDirectory", list["StepInfo"]]:
    """Return the checkpoints at `path` and those of its steps that are meant."""
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.layout import parse_step_name
    from mfdist.training.run import RunDirectory

    place = path.absolute()
    if (place / "config.toml").is_file():
        directory = RunDirectory.open(path).checkpoints
        return directory, directory.steps()
    if parse_step_name(place.name) is not None:
        directory = CheckpointDirectory(path.parent)
        steps = [info for info in directory.steps() if info.path.name == place.name]
        if steps:
            return directory, steps
    raise ConfigError(f"PATH must be a run or one of its steps, such as RUN/checkpoints/step-000000400; got {path}")


def _verify(directory: "CheckpointDirectory", info: "StepInfo") -> list[str]:
    def tell(done: int, total: int) -> None:
        observer(Preparing(activity=f"verifying step {info.step}", done=done, total=total, unit="bytes"))

    # A large step takes minutes: who looks on sees it move, a log need not.
    watched = showing(sys.stderr, RunProgress()) if sys.stderr.isatty() else contextlib.nullcontext(ignore)
    with watched as observer:
        return [str(damage) for damage in directory.verify(info.step, tell)]


def _described(info: "StepInfo") -> dict[str, Any]:
    return {
        "step": info.step,
        "path": str(info.path),
        "num_bytes": info.num_bytes,
        "num_files": info.num_files,
        "num_tables": info.num_tables,
        "created": info.created,
        "damage": info.damage,
    }


def _show(info: "StepInfo", damages: list[str]) -> None:
    typer.echo(f"step {info.step}: {'DAMAGED' if damages else 'whole'} ({quantities.num_bytes(info.num_bytes)})")
    for damage in damages:
        typer.echo(f"  {damage}")

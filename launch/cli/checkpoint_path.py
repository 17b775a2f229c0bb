"""The PATH of `mfdist checkpoint`: a run, a folder of checkpoints, or one step."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.step_info import StepInfo

StepPath = Annotated[Path, typer.Argument(metavar="PATH", help="A run, or one of its steps.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")]


def find_steps(path: Path, *, is_run: bool = False) -> tuple["CheckpointDirectory", list["StepInfo"]]:
    """Return the checkpoints at `path` and those of its steps that are meant.

    Args:
        path: a run, the folder of its checkpoints, or a step, unless `is_run`.
        is_run: whether all steps must be meant.

    Raises:
        ConfigError: it is none of those.
    """
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.layout import parse_step_name
    from mfdist.training.run import RunDirectory

    place = path.absolute()
    if (place / "config.toml").is_file():
        directory = RunDirectory.open(path).checkpoints
        return directory, directory.steps()
    if parse_step_name(place.name) is not None and not is_run:
        directory = CheckpointDirectory(path.parent)
        steps = [info for info in directory.steps() if info.path.name == place.name]
        if steps:
            return directory, steps
    elif place.is_dir() and any(parse_step_name(entry.name) is not None for entry in place.iterdir()):
        directory = CheckpointDirectory(path)
        return directory, directory.steps()
    meant = "a run" if is_run else "a run or one of its steps, such as RUN/checkpoints/step-000000400"
    raise ConfigError(f"PATH must be {meant}; got {path}")


def find_step(path: Path) -> "StepInfo":
    """Return the step at `path`, a run's last.

    Raises:
        ConfigError: it is neither a run nor a step.
        CheckpointError: the run has none yet.
    """
    _, steps = find_steps(path)
    if not steps:
        raise CheckpointError(f"there must be a committed step; {path} has none")
    return steps[-1]

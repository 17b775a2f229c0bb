"""The PATH of `mfdist checkpoint`: a run, a folder of checkpoints, or one step."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.step_info import StepInfo

StepPath = Annotated[
    str, typer.Argument(metavar="PATH", help="A run, or one of its steps; or an URL of either.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")]


def find_steps(path: str, *, is_run: bool = False) -> tuple["CheckpointDirectory", list["StepInfo"]]:
    """Return the checkpoints at `path` and those of its steps that are meant.

    Args:
        path: a run, the folder of its checkpoints, or a step, unless `is_run`.
        is_run: whether all steps must be meant.

    Raises:
        ConfigError: it is none of those.
    """
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.folder import is_url
    from mfdist.checkpoint.layout import parse_step_name
    from mfdist.training.run import RunDirectory

    parent: str | Path
    if is_url(path):
        parent, _, name = path.rstrip("/").rpartition("/")
        if parse_step_name(name) is None:
            directory = CheckpointDirectory(path)
            return directory, directory.steps()
    else:
        parent, name = Path(path).parent, Path(path).absolute().name
    place = Path(path).absolute()
    if (place / "config.toml").is_file():
        directory = RunDirectory.open(path).checkpoints
        return directory, directory.steps()
    if parse_step_name(name) is not None and not is_run:
        directory = CheckpointDirectory(parent)
        steps = [info for info in directory.steps() if Path(info.path).name == name]
        if steps:
            return directory, steps
    elif place.is_dir() and any(parse_step_name(entry.name) is not None for entry in place.iterdir()):
        directory = CheckpointDirectory(Path(path))
        return directory, directory.steps()
    meant = "a run" if is_run else "a run or one of its steps, such as RUN/checkpoints/step-000000400"
    raise ConfigError(f"PATH must be {meant}; got {path}")


def find_step(path: str) -> "StepInfo":
    """Return the step at `path`, a run's last.

    Raises:
        ConfigError: it is neither a run nor a step.
        CheckpointError: the run has none yet.
    """
    _, steps = find_steps(path)
    if not steps:
        raise CheckpointError(f"there must be a committed step; {path} has none")
    return steps[-1]

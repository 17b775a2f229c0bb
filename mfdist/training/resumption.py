"""Where a run goes on: its checkpoints against what its metrics tell of commits, since either may be gone."""

from pathlib import Path
from typing import Any

from mfdist.errors import CheckpointError
from mfdist.training.events import Event, Noted, Warned
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory


def check_commits(run: RunDirectory) -> None:
    """Refuse a run that has saved and has no checkpoint, as where a volume is not mounted: it would begin at step 0.

    Raises:
        CheckpointError: that, or the checkpoints cannot be listed; nothing was changed.

    Called on: rank 0, before the checkpoints' lock, which makes their folder.
    """
    place = run.checkpoints.path
    if isinstance(place, Path) and place.is_symlink() and not place.exists():
        raise CheckpointError(
            f"a checkpoint directory must be there; {place} is a link to {place.readlink()}, which is not; mount or "
            "make that folder."
        )
    if run.checkpoints.series.revisions():
        return
    committed = _told_commit(read_metrics(run.metrics_path))
    if committed is not None:
        raise CheckpointError(
            f"a run that has saved must have its checkpoints; {place} holds none, and {run.metrics_path} tells of one "
            f"of step {committed:,}; mount or put back that folder, or start a new run with --out."
        )


def notices(run: RunDirectory, step: int | None) -> list[Event]:
    """Return what is to be told of a run that goes on from commit `step`, or begins at 0 where there is none."""
    if step is not None and not run.metrics_path.exists():
        return [Noted(message=f"{run.metrics_path} is missing; it begins anew at step {step:,}")]
    told = read_metrics(run.metrics_path)
    committed = _told_commit(told)
    if step is not None and committed is not None and committed > step:
        return [
            Warned(
                message=f"the last checkpoint is of step {step:,}, and the metrics tell of one of step {committed:,}; "
                f"training goes on from step {step:,}"
            )
        ]
    if step is None and any(record.get("event") == "started" for record in told):
        return [Noted(message="the run ended before its first checkpoint; it begins at step 0 again")]
    return []


def _told_commit(told: list[dict[str, Any]]) -> int | None:
    """Return the last step that metrics tell to be committed; None: none is."""
    saved = [record["step"] for record in told if record.get("event") == "saved"]
    gone_on = [record["first_step"] for record in told if record.get("event") == "started" and record["first_step"]]
    return max(saved + gone_on, default=None)

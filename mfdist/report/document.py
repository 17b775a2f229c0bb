"""A report as one JSON document: the run, the runs beside it, and both in words."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfdist import __version__
from mfdist.report.story import Run
from mfdist.report.words import figures, findings, summary
from mfdist.training.run import RunDirectory

#: Of the runs beside it, what a report shows.
_OF_OTHERS = (
    "name",
    "label",
    "path",
    "kind",
    "state",
    "step",
    "last_step",
    "trained_s",
    "tokens_per_step",
    "steps",
    "evaluations",
    "baselines",
    "peak_memory_bytes",
    "tokens_per_s",
    "twin_tokens_per_s",
)


class Report:
    """What a report of a run tells, which may be asked again while it trains.

    Args:
        run: the folder of the run that is reported.
        against: those of the runs it is held against.

    Raises:
        ConfigError: a folder holds no run.
    """

    def __init__(self, run: Path, against: Sequence[Path] = ()) -> None:
        self._runs = [Run(RunDirectory.open(path)) for path in (run, *against)]

    @property
    def version(self) -> str:
        """Return what changes whenever the report does; reads what is new."""
        for run in self._runs:
            run.refresh()
        return "-".join(run.version for run in self._runs)

    def document(self) -> dict[str, Any]:
        """Return the report as JSON values; docs/reference/report.md names the keys."""
        version = self.version
        stories = [run.story() for run in self._runs]
        for story, label in zip(stories, _labels(stories), strict=True):
            story["label"] = label
        run, others = stories[0], [{key: story[key] for key in _OF_OTHERS} for story in stories[1:]]
        return {
            "version": 1,
            "mfdist": __version__,
            "made": time.time(),
            "version_of_run": version,
            "summary": summary(run, others),
            "findings": findings(run),
            "figures": figures(run),
            "runs": [run, *others],
        }


def _labels(stories: Sequence[dict[str, Any]]) -> list[str]:
    """Return a name for each run, which no other has: its own, its folder's, or both with a number."""
    folders = [Path(story["path"]).absolute().name for story in stories]
    if len(stories) == 1:
        return [stories[0]["name"]]
    if len(set(folders)) == len(folders):
        return folders
    return [f"{folder} ({number})" for number, folder in enumerate(folders, start=1)]

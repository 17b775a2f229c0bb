"""The metrics of a run: one JSON object a line in RUN/metrics.jsonl, and TensorBoard files where asked.

Each line has `event` (started, stepped, evaluated, saved, …), `time` (seconds since the epoch) and that event's fields
as in `mfdist.training.events`. A resumed run drops the lines after the step it goes on from, so the file always tells
one history.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mfdist.errors import ConfigError
from mfdist.training.events import Diagnosed, Evaluated, Event, Preparing, Stepped
from mfdist.training.writing import writing


class MetricsFile:
    """An observer that appends every event but `Preparing` to a JSON-lines file.

    Args:
        path: the file; made if missing.
        first_step: the step training goes on from; later lines of an interrupted run are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [line for line, record in _records(path) if record.get("step", 0) <= first_step]
        partial = path.with_suffix(".jsonl.partial")
        with writing(path):
            partial.write_text("".join(kept), "utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8")
        self._path = path

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, Preparing):
            return
        record = {"event": type(event).__name__.lower(), "time": time.time(), **dataclasses.asdict(event)}
        with writing(self._path):
            self._file.write(json.dumps(record, default=str, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; what could not be written was told before."""
        with contextlib.suppress(OSError):
            self._file.close()


class TensorBoard:
    """An observer that writes losses, rates and throughput as TensorBoard scalars.

    Raises:
        ConfigError: the `tensorboard` package is missing.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "training.tensorboard=true needs the tensorboard package; "
                "pip install 'mfdist[tensorboard]', or set it to false"
            ) from None
        self._writer: Any = SummaryWriter(str(directory))

    def __call__(self, event: Event) -> None:
        """Write one event's numbers."""
        match event:
            case Stepped():
                for name in (
                    "loss",
                    "dense_lr",
                    "table_lr",
                    "dense_grad_norm",
                    "table_grad_norm",
                    "tokens_per_s",
                    "lookup_share",
                ):
                    if (value := getattr(event, name)) is not None:
                        self._writer.add_scalar(f"train/{name}", value, event.step)
            case Evaluated():
                self._writer.add_scalar("validation/loss", event.loss, event.step)
                self._writer.add_scalar("validation/bits_per_byte", event.bits_per_byte, event.step)
            case Diagnosed():
                for use in event.layers:
                    for name in ("code_entropy", "dead_share", "constant_bits"):
                        self._writer.add_scalar(f"tables/{name}/{use.name}", getattr(use, name), event.step)

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()


def read_metrics(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Return a metrics file's records, of one kind where `event` is given; what follows a torn line is not."""
    return [record for _, record in _records(path) if event is None or record.get("event") == event]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield whole lines and what they say, up to the first that a crash or a power cut left unreadable."""
    if not path.exists():
        return
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if not line.endswith("\n") or not isinstance(record, dict):
            return
        yield line, record

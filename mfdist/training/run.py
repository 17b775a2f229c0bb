"""A run's directory: its configuration, metrics, checkpoints and tokenizer in fixed places.

RUN/config.toml              the resolved configuration
RUN/metrics.jsonl            one JSON object an event
RUN/table-use.json           how the last validation's tokens spread over the tables' rows
RUN/plan.json                how the tables are spread over ranks, where there are several, or over servers
RUN/tokenizer.json           the tokenizer the model was trained with
RUN/checkpoints/step-…/      one zarr store a committed step
RUN/tables/step-…/           the same steps' tables, where these lie on table servers
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.config import RunConfig, parse_config
from mfdist.errors import ConfigError
from mfdist.training.metrics import read_metrics
from mfdist.training.writing import writing

if TYPE_CHECKING:
    from mfdist.sharding.plan import ShardingPlan

# What a resumed run may change without becoming another run: everything else decides the weights or the batches.
_MAY_CHANGE = (
    "name",
    "optimizer.",
    "checkpoint.",
    "sharding.",
    "servers.",
    "launch.",
    "training.steps",
    "training.device",
    "training.precision",
    "training.compile",
    "training.cuda_graph",
    "training.micro_batches",
    "training.eval_",
    "training.sample_prompt",
    "training.is_deterministic",
    "training.twin_steps",
    "training.tensorboard",
    "data.cache_dir",
    "data.source",  # the same text may lie elsewhere; its tokens are compared
)

# Among those, what decides which states the tables' optimiser keeps, and where the checkpoints are found.
_STAYS = ("optimizer.tables.rule", "optimizer.tables.state_dtype", "checkpoint.url")

#: Where in a run's folder table servers save.
SERVED_TABLES = "tables"

# What data.source and data.tokenizer may be besides paths.
_NAMES = ("python-stdlib", "bytes", "bpe")


@dataclass(frozen=True)
class RunDirectory:
    """Where one run lives; made by `create` or `open`."""

    path: Path

    @classmethod
    def create(cls, path: Path | str, config: RunConfig) -> Self:
        """Make a new run's directory and store its configuration.

        A run that ended before its first step, because its text was wrong say, gives way to the new one.

        Raises:
            ConfigError: the path holds a run already, or anything else; nothing was changed.
            CheckpointError: the path cannot be written.
            UnavailableError: another process is training there.
        """
        run = cls(Path(path))
        has_run = run.config_path.exists()
        if has_run and run.has_trained():
            raise ConfigError(
                f"--out must name a new directory; {run.path} holds a run already; "
                f"go on with it by `mfdist train --resume {shlex.quote(str(run.path))}`, or choose another name"
            )
        if not has_run and run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise ConfigError(f"--out must name a new or empty directory; {run.path} holds something else")
        with writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        with run._checkpoints_under(config).writer_lock():  # whoever is about to train here keeps its configuration
            run.write_config(with_absolute_paths(config))
        return run

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open an existing run.

        Raises:
            ConfigError: there is no run at `path`.
        """
        run = cls(Path(path))
        if not run.config_path.is_file():
            raise ConfigError(
                f"{run.path} must be a run's directory; it has no config.toml; "
                f"start one by `mfdist train demo --out {shlex.quote(str(run.path))}`"
            )
        return run

    @property
    def config_path(self) -> Path:
        """Return the path of the resolved configuration."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """Return the path of the metrics, JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of the tokenizer's file."""
        return self.path / "tokenizer.json"

    @property
    def table_use_path(self) -> Path:
        """Return the path of the details of the tables' use; docs/reference/metrics.md describes them."""
        return self.path / "table-use.json"

    @property
    def plan_path(self) -> Path:
        """Return the path of the plan that the tables were last spread by."""
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> CheckpointDirectory:
        """Return the run's checkpoints, wherever its configuration keeps them."""
        return self._checkpoints_under(self.config if self.config_path.is_file() else None)

    @property
    def config(self) -> RunConfig:
        """Read the resolved configuration."""
        return parse_config(self.config_path.read_text("utf-8"), origin=str(self.config_path))

    @property
    def served_tables(self) -> CheckpointDirectory:
        """Return where table servers save this run's tables, which has no steps if the ranks hold them."""
        return CheckpointDirectory(self.path / SERVED_TABLES)

    def _checkpoints_under(self, config: RunConfig | None) -> CheckpointDirectory:
        url = "" if config is None else config.checkpoint.url
        return CheckpointDirectory(url or self.path / "checkpoints")

    def has_trained(self) -> bool:
        """Return whether a step was ever made, committed or not."""
        return bool(self.checkpoints.steps()) or bool(read_metrics(self.metrics_path, "stepped"))

    def write_config(self, config: RunConfig) -> None:
        """Replace the stored configuration, at once or not at all."""
        _replace(self.config_path, config.to_toml())

    def write_table_use(self, document: Mapping[str, Any]) -> None:
        """Replace the details of the tables' use, at once or not at all."""
        _replace(self.table_use_path, json.dumps(document, allow_nan=False))

    def write_plan(self, plan: "ShardingPlan | None") -> None:
        """Replace the plan that the tables are spread by; None: they are not."""
        if plan is not None:
            _replace(self.plan_path, plan.to_json())
        else:
            with writing(self.plan_path):
                self.plan_path.unlink(missing_ok=True)

    def config_with(self, overrides: Sequence[str]) -> RunConfig:
        """Return the stored configuration with `--set` overrides applied; nothing is stored.

        Raises:
            ConfigError: a key decides the weights or the batches, so that the run would become another one.
        """
        for override in overrides:
            key = override.partition("=")[0].strip()
            if not is_changeable(key):
                raise ConfigError(
                    f"a resumed run keeps its model, data, seed and batches; got --set {override}; "
                    f"start a new run to change {key}"
                )
        return parse_config(self.config_path.read_text("utf-8"), origin=str(self.config_path), overrides=overrides)


def is_changeable(key: str) -> bool:
    """Return whether a dotted key may change in a run that is continued."""
    return key.startswith(_MAY_CHANGE) and key not in _STAYS


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        partial.write_text(text, "utf-8")
        partial.replace(path)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with paths that mean the same from any folder."""
    changed: dict[str, str] = {}
    for key in ("source", "tokenizer"):
        value = getattr(config.data, key)
        if value not in _NAMES and not value.startswith("hf:"):
            changed[key] = str(Path(value).expanduser().absolute())
    made = config.model_copy(update={"data": config.data.model_copy(update=changed)})
    paths = {
        key: value.expanduser().absolute()
        for key in ("token_file", "ca", "certificate", "private_key")
        if (value := getattr(config.servers, key)) is not None
    }
    made = made.model_copy(update={"servers": config.servers.model_copy(update=paths)})
    if config.sharding.plan is None:
        return made
    plan = config.sharding.plan.expanduser().absolute()
    return made.model_copy(update={"sharding": config.sharding.model_copy(update={"plan": plan})})

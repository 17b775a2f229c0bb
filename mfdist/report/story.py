"""A run's story: everything a report tells of it, as JSON values."""

import json
from pathlib import Path
from typing import Any

from mfdist.config import RunConfig
from mfdist.errors import MfdistError
from mfdist.models.count import flops_per_token
from mfdist.report.curve import thinned
from mfdist.report.plan_view import plan_view
from mfdist.report.records import Record, RunRecords
from mfdist.report.state import RunState, state_of
from mfdist.report.time_spent import parts_of_run, parts_of_step, total_s, trained_s
from mfdist.training.run import RunDirectory

#: Of a step's record, the curves that are drawn.
_CURVES = {
    "loss": "loss",
    "tokens_per_s": "tokens_per_s",
    "memory": "peak_memory_bytes",
    "dense_lr": "dense_lr",
    "table_lr": "table_lr",
    "dense_grad_norm": "dense_grad_norm",
    "table_grad_norm": "table_grad_norm",
}
_MAX_EVALUATIONS = 400


class Run:
    """A run as reports see it; `story` may be asked again while it trains.

    Args:
        directory: of the run, which only is read.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._records = RunRecords(directory.metrics_path)
        self._plan: tuple[Any, dict[str, Any] | None] = (None, None)
        #: Vocabulary → FLOPs of a token; a run's own is not known before its text is tokenised.
        self._flops: dict[int, float] = {}

    def refresh(self) -> bool:
        """Read what is new; return whether there was anything."""
        return self._records.refresh()

    @property
    def version(self) -> str:
        """Return what changes whenever the story does."""
        return f"{self._records.version}.{self.state().kind}"

    def state(self, now: float | None = None) -> RunState:
        """Return what became of the run."""
        return state_of(self._records, now)

    def story(self, now: float | None = None) -> dict[str, Any]:
        """Return what is known, as JSON values; docs/reference/report.md names the keys."""
        records, config = self._records, self.directory.config
        started, state = records.last_of("started") or {}, self.state(now)
        steps = records.of("stepped")
        flops = self._flops_per_token(config)
        return {
            "name": config.name,
            "path": str(self.directory.path),
            "kind": config.model.kind,
            "state": {"kind": state.kind, "text": state.text, "detail": state.detail},
            "step": state.step,
            "last_step": state.last_step or config.training.steps,
            "began": (records.first or {}).get("time"),
            "wrote": (records.last or {}).get("time"),
            "trained_s": total_s(records),
            "starts": len(records.of("started")),
            "device": started.get("device", ""),
            "num_ranks": started.get("num_ranks", 1),
            "num_hosts": started.get("num_hosts", 1),
            "num_table_parameters": started.get("num_table_parameters"),
            "num_dense_parameters": started.get("num_dense_parameters"),
            "num_train_tokens": started.get("num_train_tokens"),
            "tokens_per_step": started.get("tokens_per_step", config.training.batch_size * config.training.seq_len),
            "baselines": started.get("baselines_bits_per_byte", {}),
            "model": _model(config),
            "steps": thinned(
                self._places(started, flops),
                {name: [record.get(field) for record in steps] for name, field in _CURVES.items()},
            ),
            "flops_per_token": flops,
            "evaluations": _evaluations(records, started, flops),
            "peak_memory_bytes": max((record["peak_memory_bytes"] for record in steps), default=None),
            "tokens_per_s": _speed(steps),
            "twin_tokens_per_s": (records.last_of("twintimed") or {}).get("tokens_per_s"),
            "time": {"run": parts_of_run(records), "step": parts_of_step(records)},
            "checkpoints": self._checkpoints(config),
            "tables": self._tables(),
            "plan": self._planned(config, started),
            "warnings": [record["message"] for record in records.of("warned")],
            "sample": _sample(records),
            "config": config.to_toml(),
        }

    def _flops_per_token(self, config: RunConfig) -> float:
        vocab_size = config.model.vocab_size or config.data.vocab_size
        if vocab_size not in self._flops:
            self._flops[vocab_size] = flops_per_token(config.model, config.training.seq_len, vocab_size)
        return self._flops[vocab_size]

    def _places(self, started: Record, flops_per_token: float) -> dict[str, list[float]]:
        steps = [float(record["step"]) for record in self._records.of("stepped")]
        tokens = [step * float(started.get("tokens_per_step", 0)) for step in steps]
        flops = [number * flops_per_token for number in tokens]
        return {"step": steps, "tokens": tokens, "flops": flops, "seconds": trained_s(self._records)}

    def _checkpoints(self, config: RunConfig) -> list[dict[str, Any]]:
        """Return every save that was told, and whether it is still there: None where that is not looked up."""
        is_remote = bool(config.checkpoint.url)
        there: set[int] = set()
        if not is_remote:
            there = {info.step for info in self.directory.checkpoints.steps()}
        latest = {record["step"]: record for record in self._records.of("saved")}
        return [
            {
                "step": step,
                "num_bytes": record["num_bytes"],
                "written_bytes": record.get("written_bytes"),
                "save_s": record["save_s"],
                "stall_s": record.get("stall_s"),
                "is_there": None if is_remote else step in there,
            }
            for step, record in sorted(latest.items())
        ]

    def _tables(self) -> dict[str, Any] | None:
        diagnosed = self._records.of("diagnosed")
        if not diagnosed:
            return None
        return {
            "history": [
                {"step": record["step"], "num_tokens": record["num_tokens"], "layers": record["layers"]}
                for record in _spread(diagnosed, 60)
            ],
            "detail": _json(self.directory.table_use_path),
        }

    def _planned(self, config: RunConfig, started: Record) -> dict[str, Any] | None:
        """Return the plan, priced once: it does not change while a run trains, unless it is started again."""
        if not started or config.model.kind != "memory" or not config.model.vocab_size:
            return None
        key = (started.get("time"), started.get("num_ranks"))
        if self._plan[0] != key:
            self._plan = (key, self._price(config, started))
        return self._plan[1]

    def _price(self, config: RunConfig, started: Record) -> dict[str, Any] | None:
        from mfdist.sharding.plan import ShardingPlan

        path = self.directory.plan_path
        try:
            return plan_view(
                config,
                ShardingPlan.from_json(path.read_text("utf-8")) if path.exists() else None,
                num_ranks=started.get("num_ranks", 1),
                num_hosts=started.get("num_hosts", 1),
                device_type=started.get("device_type", "cpu"),
            )
        except (OSError, MfdistError):
            return None  # a plan that was edited or is of another version is no reason to have no report


def _model(config: RunConfig) -> dict[str, Any]:
    shape = config.model
    return {
        "num_layers": shape.num_layers,
        "hidden_dim": shape.hidden_dim,
        "num_heads": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "bits": shape.bits,
        "seq_len": config.training.seq_len,
        "optimizer": config.optimizer.tables.rule if shape.kind == "memory" else "adamw",
        "precision": config.training.precision,
    }


def _evaluations(records: RunRecords, started: Record, flops_per_token: float) -> list[dict[str, Any]]:
    scored = _spread(records.of("evaluated"), _MAX_EVALUATIONS)
    seconds = dict(zip((record["step"] for record in records.of("stepped")), trained_s(records), strict=False))
    return [
        {
            "step": record["step"],
            "tokens": record["step"] * started.get("tokens_per_step", 0),
            "flops": record["step"] * started.get("tokens_per_step", 0) * flops_per_token,
            "seconds": seconds.get(record["step"]),
            "loss": record["loss"],
            "bits_per_byte": record["bits_per_byte"],
            "is_final": record["is_final"],
        }
        for record in scored
    ]


def _spread(records: list[Record], number: int) -> list[Record]:
    """Return at most so many of the records, evenly spread, the last one always."""
    if len(records) <= number:
        return records
    return [records[(index + 1) * len(records) // number - 1] for index in range(number)]


def _speed(steps: list[Record]) -> float | None:
    """Return the median tokens a second of the later half of the steps, which are warm."""
    speeds = sorted(record["tokens_per_s"] for record in steps[len(steps) // 2 :])
    return speeds[len(speeds) // 2] if speeds else None


def _sample(records: RunRecords) -> dict[str, str] | None:
    sampled = records.last_of("sampled")
    return None if sampled is None else {"prompt": sampled["prompt"], "text": sampled["text"]}


def _json(path: Path) -> dict[str, Any] | None:
    """Return what a file holds; None where it is not there, or is of another version."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("version") == 1 else None

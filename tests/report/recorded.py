"""Runs that were recorded and not trained: folders as training leaves them, written by what training writes with."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mfdist.config import RunConfig, parse_config
from mfdist.spec import TableSpec
from mfdist.training.code_census import NUM_BUCKETS, LayerCounts
from mfdist.training.events import (
    Diagnosed,
    Evaluated,
    Event,
    Failed,
    Sampled,
    Saved,
    Started,
    Stepped,
    Stopped,
    TwinTimed,
    Warned,
)
from mfdist.training.layer_use import detail_of, use_of
from mfdist.training.metrics import MetricsFile
from mfdist.training.row_movement import LayerMovement
from mfdist.training.run import RunDirectory

CONFIG = """
name = "recorded"
[model]
kind = "{kind}"
num_layers = 2
hidden_dim = 32
num_heads = 2
bits = 4
vocab_size = 300
max_seq_len = 64
[optimizer.dense]
lr = 5e-3
[training]
steps = 40
batch_size = 4
seq_len = 32
[checkpoint]
every = 20
"""


def config_of(kind: str = "memory", overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a recorded run."""
    return parse_config(CONFIG.format(kind=kind), origin="CONFIG", overrides=overrides)


def recorded(
    folder: Path, events: Sequence[Event], *, kind: str = "memory", overrides: Sequence[str] = ()
) -> RunDirectory:
    """Return the directory of a run that told these events."""
    run = RunDirectory.create(folder, config_of(kind, overrides))
    file = MetricsFile(run.metrics_path, 0)
    for event in events:
        file(event)
    file.close()
    _spread_over_time(run.metrics_path)
    if layers := [event for event in events if isinstance(event, Diagnosed)]:
        run.write_table_use(table_use(layers[-1].step))
    return run


def specs() -> list[TableSpec]:
    """Return the tables of a recorded run's model."""
    shapes = (("qkv", 128, 96), ("ffn1", 128, 48), ("ffn2", 512, 32))
    return [
        TableSpec(name=f"blocks.{block}.{part}", num_rows=rows, row_dim=width)
        for block in (0, 1)
        for part, rows, width in shapes
    ]


def _spread_over_time(path: Path) -> None:
    """Let the records of a file be a fifth of a second apart, the last one now."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for age, record in enumerate(reversed(records)):
        record["time"] -= age / 5
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def started(*, first_step: int = 0, last_step: int = 40, num_ranks: int = 1, kind: str = "memory") -> Started:
    """Return the beginning of a stretch."""
    return Started(
        run_dir=Path("run"),
        name="recorded",
        kind=kind,
        device="CPU, 2 threads",
        first_step=first_step,
        last_step=last_step,
        num_table_parameters=100_000 if kind == "memory" else 0,
        num_dense_parameters=20_000,
        num_train_tokens=5_000,
        tokens_per_step=128,
        baselines_bits_per_byte={"byte unigram": 4.5, "order-2 n-gram": 2.7},
        device_type="cpu",
        num_ranks=num_ranks,
    )


def stepped(step: int, loss: float | None = None) -> Stepped:
    """Return a step of a run that learns."""
    return Stepped(
        step=step,
        loss=2.0 + 6.0 / step if loss is None else loss,
        dense_lr=1e-3,
        table_lr=3e-3,
        dense_grad_norm=1.0,
        table_grad_norm=0.5,
        tokens_per_s=1000.0 + step,
        step_s=0.1,
        peak_memory_bytes=1 << 28,
        lookup_share=0.4 if step == 3 else None,
        time_shares={"lookups": 0.4, "matrix products": 0.5, "everything else": 0.1} if step == 3 else None,
    )


def evaluated(step: int, bits_per_byte: float | None = None, *, is_final: bool = False) -> Evaluated:
    """Return a validation."""
    bits = 1.5 + 20 / step if bits_per_byte is None else bits_per_byte
    return Evaluated(step=step, loss=bits, bits_per_byte=bits, num_tokens=512, is_final=is_final, elapsed_s=0.5)


def counts(seed: int = 0, *, bits: int = 4, num_tables: int = 8, num_tokens: int = 512) -> list[LayerCounts]:
    """Return what a census of a model of two blocks may have counted."""
    rng = np.random.default_rng(seed)
    found = []
    for index, name in enumerate(f"blocks.{block}.{part}" for block in (0, 1) for part in ("qkv", "ffn1", "ffn2")):
        codes = np.minimum(rng.geometric(0.1 + 0.08 * index, size=(num_tokens, num_tables)) - 1, (1 << bits) - 1)
        hits = np.stack([np.bincount(column, minlength=1 << bits) for column in codes.T])
        scores = np.bincount(rng.integers(280, 380, 1000), minlength=NUM_BUCKETS)
        found.append(
            LayerCounts(
                name=name, num_tables=num_tables, bits=bits, tables=tuple(range(num_tables)), hits=hits, scores=scores
            )
        )
    return found


MOVEMENT = LayerMovement(row_ids=np.arange(0, 128, 5), moved=np.linspace(0, 3, 26))


def diagnosed(step: int) -> Diagnosed:
    """Return the diagnosis that follows a validation."""
    layers = tuple(use_of(each, MOVEMENT) for each in counts(step))
    return Diagnosed(step=step, num_tokens=512, layers=layers, elapsed_s=0.01)


def table_use(step: int) -> dict[str, object]:
    """Return the details that are kept of it."""
    details = [detail_of(each, MOVEMENT) for each in counts(step)]
    return json.loads(json.dumps({"version": 1, "step": step, "num_tokens": 512, "layers": details}))  # type: ignore[no-any-return]


def saved(step: int) -> Saved:
    """Return a commit."""
    return Saved(
        step=step,
        path=Path(f"run/checkpoints/step-{step:09d}"),
        num_bytes=4_000_000,
        save_s=0.2,
        written_bytes=3_000_000,
        stall_s=0.05,
    )


def whole_run(*, kind: str = "memory", num_ranks: int = 1) -> list[Event]:
    """Return what a finished run tells."""
    events: list[Event] = [started(kind=kind, num_ranks=num_ranks)]
    for step in range(1, 41):
        events.append(stepped(step))
        if step % 10 == 0 and step < 40:
            events += [evaluated(step), *([diagnosed(step)] if kind == "memory" else [])]
        if step % 20 == 0:
            events.append(saved(step))
    events += [evaluated(40, is_final=True), *([diagnosed(40)] if kind == "memory" else [])]
    events += [Sampled(prompt="def ", text="main():\n    return 1\n"), Warned(message="notes.txt is not text; skipped")]
    if kind == "memory":
        events.append(TwinTimed(tokens_per_s=2000.0, model_tokens_per_s=1000.0, num_steps=10))
    return [*events, stopped(40)]


def stopped(step: int, reason: str = "finished") -> Stopped:
    """Return the end."""
    return Stopped(run_dir=Path("run"), step=step, last_step=40, reason=reason, elapsed_s=9.0)


def failed(message: str) -> Failed:
    """Return an end by an error."""
    return Failed(kind="non_finite", message=message)

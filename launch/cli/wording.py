"""The words for what a run tells: pure functions from events to text, used by both displays."""

import shlex
from pathlib import Path

from mfdist import quantities
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Evaluated, Preparing, Saved, Started, Stopped


def preparing(event: Preparing) -> str:
    """Return how far a preparation is, such as `3.9 MiB of 11.2 MiB`."""
    if event.unit == "bytes":
        done = quantities.num_bytes(event.done)
        return done if event.total is None else f"{done} of {quantities.num_bytes(event.total)}"
    done = quantities.count(event.done)
    of = "" if event.total is None else f" of {quantities.count(event.total)}"
    return f"{done}{of} {event.unit}"


def rate(event: Preparing, elapsed_s: float) -> str:
    """Return the mean speed of a preparation, or nothing before it can be told."""
    if elapsed_s < 0.5 or event.done <= 0:
        return ""
    per_s = event.done / elapsed_s
    return f"{quantities.num_bytes(per_s)}/s" if event.unit == "bytes" else f"{quantities.count(per_s)} {event.unit}/s"


def header(event: Started) -> list[tuple[str, str]]:
    """Return what a run is, as labels and values."""
    dense = quantities.count(event.num_dense_parameters)
    if event.kind == "memory":
        model = f"MemoryFormer, {quantities.count(event.num_table_parameters)} parameters in tables, {dense} dense"
    else:
        model = f"dense transformer, {dense} parameters"
    steps = f"{event.last_step:,}, each of {event.tokens_per_step:,} tokens"
    if event.first_step:
        steps += f", continued from step {event.first_step:,}"
    lines = [
        ("model", model),
        ("device", event.device),
        ("text", f"{quantities.count(event.num_train_tokens)} tokens to learn from"),
        ("steps", steps),
    ]
    if event.baselines_bits_per_byte:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in event.baselines_bits_per_byte.items())
        lines.append(("to beat", f"{figures} bits per byte"))
    return [*lines, ("run", str(event.run_dir))]


def status(progress: RunProgress) -> list[str]:
    """Return the state of training, the most important first; what is not known is left out."""
    if progress.stepped is None:
        return []
    step = progress.stepped
    fields = [f"loss {step.loss:.3f}"]
    if progress.evaluated is not None:
        fields.append(f"val {progress.evaluated.bits_per_byte:.3f} bpb")
    fields.append(f"{quantities.count(step.tokens_per_s)} tok/s")
    if progress.lookup_share is not None:
        fields.append(f"lookup {quantities.share(progress.lookup_share)}")
    fields.append(f"memory {quantities.num_bytes(step.peak_memory_bytes)}")
    return fields


def evaluated(event: Evaluated) -> str:
    """Return one line on a validation."""
    scope = "the whole validation text" if event.is_final else "validation"
    return f"step {event.step:,}: {scope}: {event.bits_per_byte:.3f} bits per byte, loss {event.loss:.3f}"


def saved(event: Saved) -> str:
    """Return one line on a checkpoint."""
    return (
        f"step {event.step:,}: saved {Path(event.path).name} "
        f"({quantities.num_bytes(event.num_bytes)} in {quantities.duration(event.save_s)})"
    )


def comparison(progress: RunProgress) -> list[tuple[str, str, str]]:
    """Return rows of (who, bits per byte, tokens/s): this model, the baselines, the dense twin; "" where unknown."""
    if progress.started is None:
        return []
    speed = progress.twin.model_tokens_per_s if progress.twin is not None else progress.tokens_per_s
    ours = "this MemoryFormer" if progress.started.kind == "memory" else "this dense transformer"
    score = f"{progress.evaluated.bits_per_byte:.3f}" if progress.evaluated is not None else ""
    rows = [(ours, score, "" if speed is None else quantities.count(speed))]
    rows += [(name, f"{value:.3f}", "") for name, value in progress.started.baselines_bits_per_byte.items()]
    if progress.twin is not None:
        rows.append(("its dense twin", "", quantities.count(progress.twin.tokens_per_s)))
    return rows


def outcome(event: Stopped) -> str:
    """Return one line on how training ended."""
    took = quantities.duration(event.elapsed_s)
    if event.reason == "finished":
        return f"finished {event.step:,} of {event.last_step:,} steps in {took}"
    if event.step == 0:
        return f"stopped by {event.reason} before the first step ({took}); there was nothing to save"
    kept = "all of it is saved" if event.is_saved else "nothing of it is saved, as checkpoint.every=0 has it"
    return f"stopped by {event.reason} after step {event.step:,} of {event.last_step:,} ({took}); {kept}"


def written(event: Stopped, progress: RunProgress) -> list[tuple[str, str]]:
    """Return what was written where."""
    lines = [("run", str(event.run_dir)), ("metrics", str(event.run_dir / "metrics.jsonl"))]
    if progress.saved is not None:
        lines.insert(1, ("checkpoint", str(progress.saved.path)))
    return lines


def commands(event: Stopped, verb: str = "train") -> list[tuple[str, str]]:
    """Return what to try next, as a purpose and a command that can be pasted into a shell; `verb` trains the run."""
    run = quoted(event.run_dir)
    look = ("look at it", f"mfdist report {run} --open")
    if not event.is_saved:
        return [look]
    if event.reason != "finished":
        return [("go on", f"mfdist {verb} --resume {run}")]
    steps = event.last_step * 2
    more = f"--steps {steps}" if verb == "train" else f"--set training.steps={steps}"
    return [
        ("write text", f'mfdist generate {run} --prompt "def " --tokens 50'),
        ("score it", f"mfdist evaluate {run} --json"),
        look,
        ("train on", f"mfdist {verb} --resume {run} {more}"),
    ]


def quoted(path: Path) -> str:
    """Return a path as a shell reads it."""
    return shlex.quote(str(path))

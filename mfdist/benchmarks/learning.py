"""Does a MemoryFormer learn as well as its dense twin? Both trained on the same text, tokens, batches and schedule.

A variant is a preset with some keys changed; each is trained once a seed by the loop of `mfdist train`, in a folder of
its own. A variant that has finished is not trained again, so a bench that was cut short goes on where it was.
"""

import contextlib
import gc
import itertools
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mfdist.checkpoint.lock import WriterLock
from mfdist.config import load_config
from mfdist.errors import ConfigError, NonFiniteError
from mfdist.models.count import flops_per_token
from mfdist.training.data.tokenizer import load_tokenizer
from mfdist.training.events import ignore
from mfdist.training.loop import train
from mfdist.training.metrics import read_metrics
from mfdist.training.run import RunDirectory, with_absolute_paths
from mfdist.training.state import flat
from mfdist.training.writing import writing

_KIND, _DTYPE = "model.kind", "model.table_dtype"
_RATE, _TABLE_RATE = "optimizer.dense.lr", "optimizer.tables.lr"
_EMBEDDING_MULTIPLE = "optimizer.dense.embedding_lr_multiple"
_ACCUMULATED = "optimizer.tables.accumulator_decay"
_RULE, _DECAY = "optimizer.tables.rule", "optimizer.tables.weight_decay"
_DENSE_DECAY = "optimizer.dense.weight_decay"
_MOMENTS = "optimizer.tables.state_dtype"
_BETAS = "optimizer.tables.betas"
_PAIRS = ((0.8, 0.9), (0.8, 0.95), (0.9, 0.9), (0.9, 0.99))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train.

    Args:
        name: of its runs' folders.
        question: what it is compared for: `twin` is the dense twin, `memory` the model as the preset has it.
        settings: key → value, changed in the preset.
    """

    name: str
    question: str
    settings: dict[str, str]


def _twin(lr: str, embedding_multiple: str = "1", decay: str = "0.1") -> Variant:
    parts = ("" if embedding_multiple == "1" else f"-embedding-{embedding_multiple}", f"-decay-{decay}")
    name = f"twin-{lr}{parts[0]}{parts[1] if decay != '0.1' else ''}"
    settings = {_KIND: "dense", _RATE: lr, _EMBEDDING_MULTIPLE: embedding_multiple, _DENSE_DECAY: decay}
    return Variant(name=name, question="twin", settings=settings)


def _rates(dense: str, tables: str) -> Variant:
    """The embedding learns as everything dense does, and everything decays by the same setting."""
    settings = {_RATE: dense, _EMBEDDING_MULTIPLE: "1", _TABLE_RATE: tables, _DENSE_DECAY: "0.1", _DECAY: "0.1"}
    return Variant(name=f"rates-{dense}-{tables}", question="learning rate", settings=settings)


def _dense(lr: str, embedding_multiple: str) -> Variant:
    settings = {_RATE: lr, _EMBEDDING_MULTIPLE: embedding_multiple}
    return Variant(name=f"dense-{lr}-embedding-{embedding_multiple}", question="learning rate", settings=settings)


def _decays(tables_lr: str, tables: str, dense: str) -> Variant:
    """The rate of tables, their decay, and that of everything dense."""
    name = f"tables-{tables_lr}-decay-{tables}-{dense}"
    return Variant(name=name, question="decay", settings={_TABLE_RATE: tables_lr, _DECAY: tables, _DENSE_DECAY: dense})


def _adagrad(lr: str, *, decay: str = "1.0", weight_decay: str = "0.1") -> Variant:
    """Rows in bf16, by row-wise Adagrad, whose accumulated squares decay or only grow.

    weight_decay: goes down as far as the rate goes up, for what a step decays by is their product.
    """
    settings = {_RULE: "rowwise_adagrad", _DTYPE: "bf16", _TABLE_RATE: lr, _DECAY: weight_decay}
    if decay == "1.0":
        return Variant(name=f"adagrad-{lr}", question="states", settings=settings)
    name = f"adagrad-decay-{decay}-{lr}"
    return Variant(name=name, question="states", settings={**settings, _ACCUMULATED: decay})


def _one(name: str, question: str, key: str, value: str) -> Variant:
    return Variant(name=name, question=question, settings={key: value})


#: Of the tiny preset, whose rates are 72e-3 for the embedding, 6e-3 for what else is dense, and 48e-3 for tables, and
#: whose decays are 0.02 and 0.2; the first answer the main question.
VARIANTS = (
    Variant(name="memory", question="memory", settings={}),
    *(_twin(*how) for how in (("2e-3",), ("2e-3", "10"), ("2e-3", "10", "0.5"))),
    *(_twin(*how) for how in (("2e-3", "1", "0.5"), ("2e-3", "30"), ("1e-3",), ("3e-3",))),
    _one("released-score", "score", "model.score", "released"),
    *(_one(f"temperature-{t}", "score", "model.score_temperature", t) for t in ("0.5", "0.75", "2")),
    *(_rates(rate, rate) for rate in ("1e-3", "2e-3", "3e-3", "4e-3", "6e-3", "9e-3")),
    *(_rates(*rates) for rates in (("2e-3", "6e-3"), ("2e-3", "12e-3"), ("6e-3", "12e-3"), ("12e-3", "12e-3"))),
    *(_rates(*rates) for rates in (("6e-3", "24e-3"), ("12e-3", "24e-3"), ("24e-3", "12e-3"), ("48e-3", "12e-3"))),
    *(_dense(*rates) for rates in (("3e-3", "24"), ("12e-3", "6"), ("24e-3", "3"), ("24e-3", "10"))),
    _one("bits-4", "bits", "model.bits", "4"),
    *(_one(f"extra-bits-{bits}", "extra bits", "model.extra_bits", bits) for bits in ("0", "1", "3")),
    _one("gelu", "activation", "model.activation", "gelu"),
    *(_one(f"init-{scale}", "initialisation", "model.init_scale", scale) for scale in ("0.3", "3.0")),
    *(_one(f"betas-{one}-{two}", "betas", _BETAS, f"[{one}, {two}]") for one, two in _PAIRS),
    _one("tables-linear", "schedule", "optimizer.tables.schedule", "linear"),
    Variant(
        name="warm-up-0.05",
        question="schedule",
        settings={f"optimizer.{group}.warmup_fraction": "0.05" for group in ("dense", "tables")},
    ),
    *(_decays("12e-3", tables, "0.1") for tables in ("0.0", "0.1", "0.3", "1.0")),
    *(_decays("24e-3", *both) for both in (("0.3", "0.1"), ("0.3", "0.02"), ("1.0", "0.1"))),
    *(_decays(*both, "0.02") for both in (("48e-3", "0.3"), ("96e-3", "0.1"), ("48e-3", "0.15"))),
    _decays("48e-3", "0.2", "0.005"),
    _adagrad("50e-3", weight_decay="0.012"),
    _adagrad("100e-3", weight_decay="0.006"),
    *(_adagrad(lr, decay="0.95") for lr in ("1.5e-3", "3e-3", "6e-3", "12e-3")),
    _adagrad("3e-3", decay="0.99"),
    *(
        Variant(name=f"adam-{name}", question="states", settings={_RULE: "adam", _DTYPE: "bf16", _MOMENTS: name})
        for name in ("bf16", "fp8")
    ),
)


#: Steps that compile and fill caches.
_COMPILING_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One validation."""

    step: int
    tokens: int
    flops: float  # forward and backward, a multiply-add counted once
    seconds: float  # of training steps alone: no validation, no saving, no compiling
    loss: float  # nats a token
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A finished run."""

    variant: str
    question: str
    seed: int
    device: str  # that it was trained on, which may be another than this process has
    tokens_per_s: float  # median over steps
    peak_memory_bytes: int  # of a GPU; on a CPU of the process, runs before it included
    points: list[Point]
    note: str = ""  # why it ended before its last step; points are those until then


def measure(
    folder: Path,
    preset: str,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    settings: Sequence[str],
    *,
    may_begin: Callable[[], bool],
    tell: Callable[[str], None],
) -> Iterator[Learned]:
    """Train what has not been trained yet, every variant with the first seed before any with the second; yield all.

    Args:
        folder: of the runs, kept.
        preset: of all variants, or the path of a configuration.
        variants: of VARIANTS.
        seeds: of initialisation and batches.
        settings: `key=value` for all variants, such as steps and text; a variant's own come after.
        may_begin: asked before each run; once it says no, only what is finished is yielded.
        tell: told of what begins.

    Raises:
        ConfigError: a run that is kept was trained with other settings; a setting for all is one that a variant has
            itself; or what they all start from is no MemoryFormer.
        UnavailableError: another process trains in the folder, and there is something to train.
    """
    _check_not_overridden(variants, settings)
    if (kind := load_config(preset, [*_OF_ALL, *settings]).model.kind) != "memory":
        raise ConfigError(f"variants must start from a MemoryFormer; got {_KIND}={kind}; its twins are variants too")
    with contextlib.ExitStack() as held:
        is_ours = False
        for seed, variant in itertools.product(seeds, variants):
            path = folder / f"{variant.name}-seed-{seed}"
            own = [f"{key}={value}" for key, value in variant.settings.items()]
            overrides = [*_OF_ALL, *settings, *own, f"training.seed={seed}"]
            if _is_finished(path) or _diverged(path):
                _check_same(path, preset, overrides)
            else:
                if not may_begin():
                    continue
                if not is_ours:  # two at a time would take each other's runs for some that were cut short
                    held.callback(_locked(folder).release)
                    is_ours = True
                tell(f"training {path.name}")
                with contextlib.suppress(NonFiniteError):  # which its metrics have, and others may not
                    _train(path, preset, overrides)
                if not (_is_finished(path) or _diverged(path)):  # it was told to stop, and so are the others
                    return
            yield _learned(path, variant, seed)


def _locked(folder: Path) -> WriterLock:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return WriterLock(folder)


#: Every validation takes the whole text, so that all are alike; no saves, no sample, no timed twin.
_OF_ALL = (
    "training.eval_sequences=1000000",
    "training.twin_steps=0",
    'training.sample_prompt=""',
    "checkpoint.every=0",
)


def _check_not_overridden(variants: Sequence[Variant], settings: Sequence[str]) -> None:
    """Raise ConfigError where a variant would quietly do without a setting that was asked for."""
    for key, _, value in (setting.partition("=") for setting in settings):
        name, wanted = key.strip(), value.strip()
        if name == "training.seed":
            raise ConfigError(f"--set must leave seeds to --seeds; got {name}={wanted}; give --seeds {wanted}")
        for variant in variants:
            if _number(variant.settings.get(name, wanted)) != _number(wanted):
                raise ConfigError(
                    f"--set must leave alone what a variant is about; got {name}={wanted}, and {variant.name} has "
                    f"{name}={variant.settings[name]}; leave one of them out"
                )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _is_finished(path: Path) -> bool:
    stops = read_metrics(path / "metrics.jsonl", "stopped") if (path / "metrics.jsonl").exists() else []
    return bool(stops) and stops[-1]["reason"] == "finished"


def _diverged(path: Path) -> str:
    """Return how a run ended whose loss was not finite; empty for others. Training it again would end alike."""
    failed = read_metrics(path / "metrics.jsonl", "failed")
    return next((str(each["message"]) for each in failed if each["kind"] == NonFiniteError.kind), "")


def _check_same(path: Path, preset: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError unless the run that is kept is the one that would be trained now."""
    asked = with_absolute_paths(load_config(preset, overrides))
    kept, wanted = (flat(each.model_dump()) for each in (RunDirectory.open(path).config, asked))
    for key, value in wanted.items():
        is_left_to_text = key == "model.vocab_size" and value == 0
        if kept.get(key) != value and not is_left_to_text:
            raise ConfigError(
                f"runs that are kept must have the settings asked for; {path} has {key}={kept.get(key)!r}, not "
                f"{value!r}; move it away to train it anew, or give another --out"
            )


def _train(path: Path, preset: str, overrides: Sequence[str]) -> None:
    if path.exists():  # cut short; nothing of it was saved
        shutil.rmtree(path)
    torch.compiler.reset()  # which gives up compiling after a few models in one process
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # a run's peak is its own
    torch.manual_seed(0)
    run = RunDirectory.create(path, load_config(preset, overrides))
    train(run, observer=ignore)


def _learned(path: Path, variant: Variant, seed: int) -> Learned:
    config = RunDirectory.open(path).config
    started = read_metrics(path / "metrics.jsonl", "started")[-1]
    steps = read_metrics(path / "metrics.jsonl", "stepped")
    tokens_a_step = started["tokens_per_step"]
    flops_a_token = flops_per_token(config.model, config.training.seq_len, _vocab_size(path))
    seconds = list(itertools.accumulate(_without_compiling([each["step_s"] for each in steps]), initial=0.0))
    points = [
        Point(
            step=each["step"],
            tokens=each["step"] * tokens_a_step,
            flops=each["step"] * tokens_a_step * flops_a_token,
            seconds=seconds[each["step"]],
            loss=each["loss"],
            bits_per_byte=each["bits_per_byte"],
        )
        for each in read_metrics(path / "metrics.jsonl", "evaluated")
    ]
    return Learned(
        variant=variant.name,
        question=variant.question,
        seed=seed,
        device=started["device"],
        tokens_per_s=statistics.median([each["tokens_per_s"] for each in steps] or [math.nan]),
        peak_memory_bytes=max((each["peak_memory_bytes"] for each in steps), default=0),
        points=points,
        note=_diverged(path),
    )


def _without_compiling(seconds: Sequence[float]) -> list[float]:
    """Return how long steps took, the first few and others that took three times the median as long as that."""
    usual = statistics.median(seconds or [0.0])
    return [each if index >= _COMPILING_STEPS and each < 3 * usual else usual for index, each in enumerate(seconds)]


def _vocab_size(path: Path) -> int:
    return load_tokenizer(path / "tokenizer.json").vocab_size


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far the MemoryFormer is ahead of its twin at some of the twin's learning rates, in nats a token.

    Args:
        twin: the twin's variant.
        at_tokens: the mean of the twin's last losses less that of the memory's.
        at_seconds: the same, where both have trained as long as the faster of them; None where their validations do not
            reach there.
        spread: the largest difference between seeds of one of the two; None where each has one.
    """

    twin: str
    at_tokens: float
    at_seconds: float | None
    spread: float | None


def gaps(found: Sequence[Learned]) -> list[Gap]:
    """Return how far `memory` is ahead of every `twin`, the best of these first; empty where one is missing.

    A model of which some run's loss was not finite is left out.
    """
    runs: dict[str, list[Learned]] = {}
    left_out = {each.variant for each in found if each.note}
    for each in found:
        if each.question in ("memory", "twin") and each.points and each.variant not in left_out:
            runs.setdefault(each.variant, []).append(each)
    memory = runs.pop("memory", None)
    if memory is None:
        return []
    made = [_gap(memory, twin) for twin in runs.values()]
    return sorted(made, key=lambda gap: gap.at_tokens)


def _gap(memory: Sequence[Learned], twin: Sequence[Learned]) -> Gap:
    seconds = min(each.points[-1].seconds for each in (*memory, *twin))
    ends = [[each.points[-1].loss for each in of_one] for of_one in (memory, twin)]
    then = [[_loss_at(each.points, seconds) for each in of_one] for of_one in (memory, twin)]
    known = [[loss for loss in losses if loss is not None] for losses in then]
    is_known = all(len(some) == len(losses) for some, losses in zip(known, then, strict=True))
    return Gap(
        twin=twin[0].variant,
        at_tokens=statistics.mean(ends[1]) - statistics.mean(ends[0]),
        at_seconds=statistics.mean(known[1]) - statistics.mean(known[0]) if is_known else None,
        spread=max(max(losses) - min(losses) for losses in ends) if max(map(len, ends)) > 1 else None,
    )


def _loss_at(points: Sequence[Point], seconds: float) -> float | None:
    """Return the loss after so many seconds, on the line between the validations around."""
    for before, after in itertools.pairwise(points):
        if before.seconds <= seconds <= after.seconds:
            share = (seconds - before.seconds) / max(after.seconds - before.seconds, 1e-9)
            return before.loss + share * (after.loss - before.loss)
    return None

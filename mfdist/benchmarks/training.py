"""How fast a MemoryFormer trains beside its dense twin: whole steps of `mfdist train`, and what their time goes to.

All have the same shape, batch, precision and optimiser, and repeat themselves bit for bit, as `mfdist train` does,
unless `training.is_deterministic=false` is set. Text is replaced by random tokens, on which speed does not depend. One
trains after the other, each alone on the device, so that its peak of memory is its own.
"""

import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfdist.benchmarks.timing import quartile_spread
from mfdist.config import RunConfig, load_config
from mfdist.models import Transformer, build_model
from mfdist.training.device import deterministic, is_out_of_memory, peak_memory_bytes
from mfdist.training.optimizer import RunOptimizer, table_parameter_names
from mfdist.training.step import TrainStep
from mfdist.training.step_graph import EAGER_STEPS
from mfdist.training.stepping import Stepping

#: Contender → what is changed in the preset; the one that all are compared with comes first.
CONTENDERS = {
    "dense twin": {"model.kind": "dense"},
    "MemoryFormer": {"model.kind": "memory"},
    "MemoryFormer, bf16 rows, row-wise Adagrad": {
        "model.kind": "memory",
        "model.table_dtype": "bf16",
        "optimizer.tables.rule": "rowwise_adagrad",
        "optimizer.tables.state_dtype": "fp32",
    },
    "MemoryFormer, bf16 rows, Adam in bytes": {
        "model.kind": "memory",
        "model.table_dtype": "bf16",
        "optimizer.tables.rule": "adam",
        "optimizer.tables.state_dtype": "fp8",
    },
}
#: Steps that compile, fill caches, make the optimiser's states, and record a graph; the profiled one is among them.
_WARMUP_STEPS = EAGER_STEPS + 2
_PROFILED = EAGER_STEPS - 1
#: Batches that are seen in turn, so few that the loss on them must fall.
_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """What one model did; a model that does not fit into memory has a note and no figures.

    Args:
        contender: a name in CONTENDERS.
        note: why it was not measured.
        step_s: median.
        spread: how far apart the quartiles of the steps' times are, a share of the median; NaN for a single step.
        tokens_per_s: at that.
        ratio: to the first contender's tokens a second.
        peak_memory_bytes: on a GPU, of all steps; None on a CPU, where it cannot be told from the others'.
        table_bytes: rows, their gradients and their states, per parameter of tables; None without tables.
        shares: kind of work → its share of the device's time in one step.
        first_loss, last_loss: in nats a token; of the first step, and of the last on the same tokens.
    """

    contender: str
    note: str = ""
    step_s: float = math.nan
    spread: float = math.nan
    tokens_per_s: float = math.nan
    ratio: float = math.nan
    peak_memory_bytes: int | None = None
    table_bytes: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    first_loss: float = math.nan
    last_loss: float = math.nan

    @property
    def is_wrong(self) -> bool:
        """Return whether the model did not learn what it saw again and again; NaN is not learning."""
        return not self.note and not self.last_loss < self.first_loss


def measure_training(
    preset: str, settings: Sequence[str], device: torch.device, *, steps: int = 20
) -> Iterator[TrainingSpeed]:
    """Yield each contender's speed, the first one's first.

    Args:
        preset: a preset, or a TOML file.
        settings: `section.key=value` changes for all.
        device: where they train.
        steps: that are timed.

    Raises:
        ConfigError: some contender cannot be trained with these settings; none was.
    """
    first: float | None = None
    configs = {
        contender: load_config(preset, [*settings, *(f"{key}={value}" for key, value in changes.items())])
        for contender, changes in CONTENDERS.items()
    }
    for contender, config in configs.items():
        _release(device)
        try:
            with deterministic(config.training.is_deterministic):
                speed = _measured(contender, config, device, steps, first)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            speed = TrainingSpeed(contender=contender, note="needs more memory than there is")
        first = first or speed.tokens_per_s
        yield speed


def _release(device: torch.device) -> None:
    """Forget the contender before, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _measured(
    contender: str, config: RunConfig, device: torch.device, steps: int, first: float | None
) -> TrainingSpeed:
    training = config.training
    vocab_size = config.model.vocab_size or config.data.vocab_size
    torch.manual_seed(training.seed)
    with device:
        model = build_model(config.model.model_copy(update={"vocab_size": vocab_size}))
    optimizer = RunOptimizer(model, config.optimizer, seed=training.seed)
    train_step = TrainStep(model, optimizer, training, device)
    shape = (_BATCHES, training.batch_size, training.seq_len + 1)
    batches = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    # The rates near the schedule's end: at their peak, without the warm-up before it, a wide model may diverge.
    first_step = training.steps * 9 // 10
    stepping = Stepping(
        train_step,
        lambda step: _in_two(batches[step % _BATCHES]),
        config,
        device,
        first_profiled=first_step + _PROFILED,
    )
    losses: list[float] = []
    shares: dict[str, float] = {}
    last_step = first_step + _WARMUP_STEPS + steps - 1
    for step in range(first_step, last_step + 1):
        # What is compiled in a step is not to be waited for in the next one's time.
        is_read = step - first_step < _WARMUP_STEPS or step == last_step
        for told in stepping.step(step, is_read=is_read):
            losses.append(told.loss)
            shares = shares or told.time_shares or {}
    seconds = stepping.seconds[_WARMUP_STEPS - 1 :]  # the profiled step is not among them
    peak = peak_memory_bytes(device) if device.type == "cuda" else None
    step_s = statistics.median(seconds)
    tokens_per_s = training.batch_size * training.seq_len / step_s
    return TrainingSpeed(
        contender=contender,
        step_s=step_s,
        spread=quartile_spread(seconds),
        tokens_per_s=tokens_per_s,
        ratio=tokens_per_s / (first or tokens_per_s),
        peak_memory_bytes=peak,
        table_bytes=_table_bytes(model, optimizer),
        shares=shares,
        first_loss=losses[0],
        last_loss=losses[_BATCHES * ((len(losses) - 1) // _BATCHES)],
    )


def _in_two(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets that tokens [B, T + 1] are."""
    return tokens[:, :-1], tokens[:, 1:]


def _table_bytes(model: Transformer, optimizer: RunOptimizer) -> float | None:
    """Return what tables take in training, in bytes a parameter."""
    names = table_parameter_names(model)
    if not names:
        return None
    rows = {name: value for name, value in model.named_parameters() if name in names}
    states = optimizer.state()
    num_bytes = sum(value.nbytes for value in rows.values())
    num_bytes += sum(state.nbytes for name in rows for state in states.get(name, {}).values() if state.ndim)
    if not optimizer.is_fused:
        num_bytes += sum(value.nbytes for value in rows.values())
    return num_bytes / math.fsum(value.numel() for value in rows.values())

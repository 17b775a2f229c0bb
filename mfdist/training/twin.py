"""Timing the dense twin on a run's own batches, so that speed is always told beside the alternative's."""

from statistics import median

import torch

from mfdist.config import RunConfig
from mfdist.models import build_model
from mfdist.training.data.batches import TokenBatches
from mfdist.training.events import Observer, Preparing
from mfdist.training.optimizer import RunOptimizer
from mfdist.training.step import TrainStep
from mfdist.training.step_graph import EAGER_STEPS
from mfdist.training.stepping import Stepping

NUM_WARMUP_STEPS = EAGER_STEPS + 1  # the last of which may record a graph


def time_dense_twin(config: RunConfig, batches: TokenBatches, device: torch.device, observer: Observer) -> float:
    """Train the dense twin for `training.twin_steps` steps and return its median tokens a second.

    The twin has the run's shape, precision, batch and optimiser; it is dropped afterwards, and torch's random
    generator is as before.
    """
    before = torch.get_rng_state()
    with device:
        twin = build_model(config.model.model_copy(update={"kind": "dense"}))
    step = TrainStep(twin, RunOptimizer(twin, config.optimizer), config.training, device)
    stepping = Stepping(step, batches.at, config, device)
    num_steps = NUM_WARMUP_STEPS + config.training.twin_steps
    for index in range(num_steps):
        observer(Preparing(activity="timing the dense twin", done=index, total=num_steps, unit="steps"))
        for _ in stepping.step(index, is_read=index + 1 == num_steps):
            pass
    observer(Preparing(activity="timing the dense twin", done=num_steps, total=num_steps, unit="steps"))
    torch.set_rng_state(before)
    return config.training.batch_size * config.training.seq_len / median(stepping.seconds[NUM_WARMUP_STEPS:])

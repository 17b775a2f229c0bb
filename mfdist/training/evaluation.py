"""Scoring a model on held-out text, in nats a token and bits per byte."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from mfdist.models import Transformer
from mfdist.training.checkpointed import load_run_model
from mfdist.training.code_census import CodeCensus
from mfdist.training.data.batches import validation_batches
from mfdist.training.data.ngram import baselines
from mfdist.training.data.token_store import TokenStore, prepare_tokens
from mfdist.training.events import Evaluated, Observer, ignore
from mfdist.training.run import RunDirectory
from mfdist.training.step import autocast, token_loss
from mfdist.training.world import World

BATCH_TOKENS = 8192  # of a validation batch; bounds the memory of its logits


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """A checkpoint's score on the whole validation text, beside what needs no training."""

    step: int
    loss: float
    bits_per_byte: float
    num_tokens: int
    baselines_bits_per_byte: dict[str, float]


def evaluate(
    model: Transformer,
    store: TokenStore,
    *,
    step: int,
    seq_len: int,
    precision: str = "fp32",
    max_sequences: int | None = None,
    world: World | None = None,
    census: CodeCensus | None = None,
) -> Evaluated:
    """Return the mean loss over the validation text, or over `max_sequences` sequences spread over it.

    Bits per byte divide the summed loss by the UTF-8 bytes of the predicted tokens, so that models with different
    tokenizers compare; predicting the end of a document costs bits and yields no bytes. Several ranks share every batch
    out among them. A census counts the codes of the tokens that are scored.
    """
    start = time.perf_counter()
    world = world or World(device=torch.device("cpu"))
    device = next(model.parameters()).device
    num_bytes_of = torch.from_numpy(store.tokenizer.token_num_bytes)
    nats = num_tokens = num_bytes = 0.0
    counting = nullcontext() if census is None else census.watching()
    with torch.inference_mode(), autocast(device, precision), counting:
        for inputs, targets in validation_batches(
            store.validation, seq_len, max(1, BATCH_TOKENS // seq_len), max_sequences=max_sequences
        ):
            mine = slice(*(len(inputs) * part // world.world_size for part in (world.rank, world.rank + 1)))
            inputs, targets = inputs[mine], targets[mine]
            counted = targets[targets >= 0]
            if census is not None:
                census.batch(targets >= 0)
            nats += token_loss(model, inputs.to(device), targets.to(device), reduction="sum").item()
            num_tokens += counted.numel()
            num_bytes += num_bytes_of[counted].sum().item()
    nats, num_tokens, num_bytes = world.total(torch.tensor([nats, num_tokens, num_bytes], dtype=torch.float64)).tolist()
    return Evaluated(
        step=step,
        loss=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / max(1.0, num_bytes),
        num_tokens=int(num_tokens),
        is_final=max_sequences is None,
        elapsed_s=time.perf_counter() - start - (0.0 if census is None else census.elapsed_s),
    )


def evaluate_run(run: RunDirectory, step: int | None = None, observer: Observer = ignore) -> EvaluationReport:
    """Score a committed step of a run (by default the last) on its whole validation text."""
    config = run.config
    store = prepare_tokens(config.data, observer=observer)
    model, found_step = load_run_model(run, step, data_fingerprint=store.fingerprint)
    scored = evaluate(
        model, store, step=found_step, seq_len=config.training.seq_len, precision=config.training.precision
    )
    return EvaluationReport(
        step=found_step,
        loss=scored.loss,
        bits_per_byte=scored.bits_per_byte,
        num_tokens=scored.num_tokens,
        baselines_bits_per_byte=baselines(store),
    )

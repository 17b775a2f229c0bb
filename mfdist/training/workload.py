"""A run as a workload: what its step asks of tables, memory and arithmetic, for plans to be made before it starts."""

import torch

from mfdist.config import ModelConfig, RunConfig
from mfdist.models import Transformer, count
from mfdist.models.loads import table_loads
from mfdist.optim import STATE_DTYPES
from mfdist.sharding.workload import Workload

#: Numbers of width d that a block keeps for backward: norms' inputs and outputs, queries, keys, values, attention, the
#: widened hidden layer twice, and its output.
_KEPT_WIDTHS = 12


def run_workload(config: RunConfig, model: Transformer, *, batch_tokens: int | None = None) -> Workload:
    """Return what a step of a run asks.

    Args:
        config: of the run.
        model: built from it, on any device, `meta` included.
        batch_tokens: tokens a step over all ranks; by default the configuration's.
    """
    training, tables, shape = config.training, config.optimizer.tables, model.config
    totals = count(model, training.seq_len)
    multiply_adds = totals.block.attention_flops / training.seq_len * shape.num_layers
    multiply_adds += shape.hidden_dim * shape.vocab_size
    return Workload(
        batch_tokens=batch_tokens or training.batch_size * training.seq_len,
        loads=table_loads(model),
        micro_batches=training.micro_batches,
        rule="adam" if tables.rule == "adamw" else tables.rule,
        state_dtype=STATE_DTYPES[tables.state_dtype],
        is_fused=tables.is_fused,
        lookup_dtype=torch.bfloat16 if training.precision == "bf16" else None,
        num_dense_parameters=totals.num_dense_parameters,
        dense_flops_per_token=2 * 3 * multiply_adds,
        activation_bytes_per_token=_activation_bytes(shape),
    )


def _activation_bytes(shape: ModelConfig) -> float:
    """Return an estimate in fp32: what blocks keep, and the logits with their gradient."""
    return 4.0 * (_KEPT_WIDTHS * shape.num_layers * shape.hidden_dim + 2 * shape.vocab_size)

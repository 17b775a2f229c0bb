"""A run as a workload, against the configuration and the model."""

import pytest

from mfdist.config import load_config
from mfdist.models import build_model
from mfdist.training.workload import run_workload


def test_a_workload_is_that_of_the_configuration():
    config = load_config("demo", ["model.vocab_size=300", "training.micro_batches=2"])
    model = build_model(config.model, device="meta")
    work = run_workload(config, model)
    assert work.batch_tokens == 16 * 256
    assert work.micro_batches == 2
    assert (work.rule, work.is_fused) == ("adam", False)
    assert len(work.loads) == 3 * 4
    tables = sum(module.numel() for name, module in model.named_parameters() if ".table." in name)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert work.num_dense_parameters == everything - tables
    # attention 2·s·d a token and layer (σ(QKᵀ)V), the head d·V; two operations a multiply-add, backward twice forward
    assert work.dense_flops_per_token == pytest.approx(6 * (4 * 2 * 256 * 128 + 128 * 300))
    assert run_workload(config, model, batch_tokens=77).batch_tokens == 77

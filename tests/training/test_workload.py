"""A run as a workload, against the configuration and the model."""

import pytest
import torch

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


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.uint8)])
def test_the_tables_rule_decides_what_is_kept(name, dtype):
    settings = ["model.vocab_size=300", "model.table_dtype=bf16", "training.precision=bf16"]
    config = load_config("demo", [*settings, "optimizer.tables.rule=adam", f"optimizer.tables.state_dtype={name}"])
    work = run_workload(config, build_model(config.model, device="meta"))
    assert (work.rule, work.is_fused, work.state_dtype) == ("adam", True, dtype)
    assert work.lookup_dtype == torch.bfloat16
    config = load_config("demo", [*settings, "optimizer.tables.rule=rowwise_adagrad"])
    assert run_workload(config, build_model(config.model, device="meta")).rule == "rowwise_adagrad"

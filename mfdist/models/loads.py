"""What a model asks of its tables, as plans need it. Build the model on the `meta` device: nothing is read."""

import torch
from torch import nn

from mfdist.layers import MemoryLayer
from mfdist.sharding.workload import TableLoad
from mfdist.spec import TableSpec
from mfdist.table import Table


def table_specs(model: nn.Module) -> list[TableSpec]:
    """Return the specs of a model's tables, each once, in the order of its modules."""
    return list({module.spec.name: module.spec for module in model.modules() if isinstance(module, Table)}.values())


def table_loads(model: nn.Module) -> dict[str, TableLoad]:
    """Return how each table that lies behind a `MemoryLayer` is read, by its name."""
    return {
        layer.table.spec.name: TableLoad(
            num_lookups=layer.hash.num_tables,
            code_stride=layer.hash.code_stride,
            id_bytes=_code_bytes(layer),
        )
        for layer in model.modules()
        if isinstance(layer, MemoryLayer)
    }


def _code_bytes(layer: MemoryLayer) -> int:
    codes, _ = layer.hash(torch.empty(0, layer.in_features, device="meta"))
    return codes.element_size()

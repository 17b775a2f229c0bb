"""What a model asks of its tables, against the tables and codes it really makes."""

import torch
from torch import nn

from mfdist.config import load_config
from mfdist.layers import MemoryLayer
from mfdist.models import build_model
from mfdist.models.loads import table_loads, table_specs


def test_loads_are_those_of_the_lookups_that_happen():
    layers = nn.Sequential(
        MemoryLayer(16, 24, bits=4, name="narrow"), MemoryLayer(24, 8, bits=12, name="wide", bias=False)
    )
    seen = {}
    for layer in layers:
        codes, _ = layer.hash(torch.randn(3, layer.in_features))
        seen[layer.table.spec.name] = (codes.shape[1], layer.hash.code_stride, codes.element_size())
    loads = table_loads(layers)
    assert {name: (load.num_lookups, load.code_stride, load.id_bytes) for name, load in loads.items()} == seen
    assert [spec.name for spec in table_specs(layers)] == ["narrow", "wide"]


def test_a_whole_model_needs_no_memory_for_it():
    shape = load_config("base").model.model_copy(update={"vocab_size": 257})
    model = build_model(shape, device="meta")
    specs = table_specs(model)
    assert len(specs) == 3 * shape.num_layers
    assert set(table_loads(model)) == {spec.name for spec in specs}
    assert specs[0].row_dim == 3 * shape.hidden_dim

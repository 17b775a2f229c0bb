"""Tables and workloads of the shapes MemoryFormers have, small enough to plan in a moment."""

import torch

from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec


def memoryformer(num_layers=2, hidden_dim=256, dtype=torch.float32):
    """Return the specs and loads of a MemoryFormer's tables."""
    slots = hidden_dim // 8
    shapes = {"qkv": (256, 3 * hidden_dim), "ffn1": (256, 10 * slots), "ffn2": (1024, hidden_dim)}
    specs, loads = [], {}
    for layer in range(num_layers):
        for part, (stride, row_dim) in shapes.items():
            name = f"blocks.{layer}.{part}"
            specs.append(TableSpec(name=name, num_rows=slots * stride, row_dim=row_dim, dtype=dtype))
            loads[name] = TableLoad(num_lookups=slots, code_stride=stride, id_bytes=1 if stride == 256 else 4)
    return specs, loads


def workload(loads, **changes):
    """Return a workload of 4096 tokens a step unless told otherwise."""
    return Workload(**{"batch_tokens": 4096, "loads": loads, **changes})

"""Memory tables bigger than a GPU, as an ordinary PyTorch layer.

`MemoryLayer` stands in for `nn.Linear`; its rows live in a `Table`. `MemoryFormer` is a whole transformer of them and
`DenseTransformer` its twin of the same shape; `replace_linear` converts models that you have. `load_config` reads what
describes a run. Everything here is loaded when it is first used, so that `import mfdist` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mfdist.config import RunConfig, load_config
    from mfdist.conversion import replace_linear
    from mfdist.layers import MemoryLayer
    from mfdist.models import DenseTransformer, MemoryFormer
    from mfdist.optim import RowAdagrad, RowAdam, RowSGD
    from mfdist.parallelize import shard, table_parameters
    from mfdist.sharding.plan import ShardingPlan
    from mfdist.table import Table
    from mfdist.tables.local import LocalTable
    from mfdist.tables.sharded import ShardedTable

    __version__: str

__all__ = [
    "DenseTransformer",
    "LocalTable",
    "MemoryFormer",
    "MemoryLayer",
    "RowAdagrad",
    "RowAdam",
    "RowSGD",
    "RunConfig",
    "ShardedTable",
    "ShardingPlan",
    "Table",
    "__version__",
    "load_config",
    "replace_linear",
    "shard",
    "table_parameters",
]

_HOME = {
    "DenseTransformer": "mfdist.models",
    "LocalTable": "mfdist.tables.local",
    "MemoryFormer": "mfdist.models",
    "MemoryLayer": "mfdist.layers",
    "RowAdagrad": "mfdist.optim",
    "RowAdam": "mfdist.optim",
    "RowSGD": "mfdist.optim",
    "RunConfig": "mfdist.config",
    "ShardedTable": "mfdist.tables.sharded",
    "ShardingPlan": "mfdist.sharding.plan",
    "Table": "mfdist.table",
    "load_config": "mfdist.config",
    "replace_linear": "mfdist.conversion",
    "shard": "mfdist.parallelize",
    "table_parameters": "mfdist.parallelize",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it."""
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'mfdist' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that only those who ask should pay

    try:
        return version("mfdist")
    except PackageNotFoundError:
        return "0+unknown"  # run from a checkout that was never installed

"""Language models whose projections are memory layers, and the dense twin to compare them with."""

from mfdist.models.blocks import DenseBlock, MemoryBlock
from mfdist.models.count import BlockCount, ModelCount, count
from mfdist.models.transformer import DenseTransformer, MemoryFormer, Transformer, build_model

__all__ = [
    "BlockCount",
    "DenseBlock",
    "DenseTransformer",
    "MemoryBlock",
    "MemoryFormer",
    "ModelCount",
    "Transformer",
    "build_model",
    "count",
]

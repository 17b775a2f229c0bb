"""What a model costs, counted from its modules: parameters, bytes read a token, FLOPs of a block.

As the MemoryFormer paper does, a multiply-add counts as one FLOP and attention is counted without its causal mask.
Counting needs no parameters: build the model on the `meta` device.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mfdist.config import ModelConfig
from mfdist.layers import MemoryLayer
from mfdist.models.blocks import Block
from mfdist.models.transformer import Transformer, build_model
from mfdist.table import Table

# Operations an element: sign and shift, |z|, scale, exp, add, product of the score; square, sum, scale, weight of
# RMSNorm; mean, centre and bias besides in LayerNorm; two products and a sum a rotated element.
_HASH_OPS, _RMS_NORM_OPS, _LAYER_NORM_OPS, _ROTARY_OPS = 7, 4, 7, 3


@dataclass(frozen=True, kw_only=True)
class BlockCount:
    """FLOPs of one block over a sequence."""

    seq_len: int
    projection_flops: int  # multiply-adds of lookups or matrix products, the paper's "without attention"
    attention_flops: int  # σ(QKᵀ)V
    elementwise_flops: int  # hashing, norms, biases, residual sums, rotary positions; the paper leaves them out

    @property
    def flops(self) -> int:
        """Return the FLOPs of projections and attention, as the paper totals them."""
        return self.projection_flops + self.attention_flops


@dataclass(frozen=True, kw_only=True)
class ModelCount:
    """Sizes and costs of a model."""

    num_table_parameters: int
    num_dense_parameters: int
    rows_read_per_token: int  # over all blocks
    bytes_read_per_token: int  # parameters read to compute one token alone, the classifier head included
    block: BlockCount

    @property
    def num_parameters(self) -> int:
        """Return the parameters of tables and dense layers together."""
        return self.num_table_parameters + self.num_dense_parameters


def count(model: Transformer, seq_len: int = 2048) -> ModelCount:
    """Return a model's parameters, the bytes one token reads, and the FLOPs of one block over `seq_len` tokens.

    Args:
        model: on any device, `meta` included.
        seq_len: tokens of the sequence that the block's FLOPs are counted for.

    Source: MemoryFormer (arXiv 2411.12992), table 1 and section 2.4. The paper rounds a block's lookups up to
        6/τ · s·d²; they are (3 + 1.25 + 1)/τ · s·d² for its shapes, which is what is counted here.
    """
    block = model.blocks[0]
    assert isinstance(block, Block)
    tables = {id(parameter): parameter for table in _tables(model) for parameter in table.parameters()}
    num_table_parameters = sum(table.spec.num_rows * table.spec.row_dim for table in _tables(model))
    dense = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    rows_bytes = sum(
        layer.hash.num_tables * layer.out_features * layer.table.spec.dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, MemoryLayer)
    )
    embedding = model.embedding.weight
    one_embedding = embedding.shape[1] * embedding.itemsize
    dense_bytes = sum(parameter.nbytes for parameter in dense) - embedding.nbytes + one_embedding
    return ModelCount(
        num_table_parameters=num_table_parameters,
        num_dense_parameters=sum(parameter.numel() for parameter in dense),
        rows_read_per_token=sum(layer.hash.num_tables for layer in model.modules() if isinstance(layer, MemoryLayer)),
        bytes_read_per_token=rows_bytes + dense_bytes,
        block=count_block(block, model.config.hidden_dim, seq_len),
    )


def flops_per_token(config: ModelConfig, seq_len: int, vocab_size: int) -> float:
    """Return the FLOPs of forward and backward of one token in a sequence: three times those of forward."""
    with torch.device("meta"):
        block = count(build_model(config.model_copy(update={"vocab_size": vocab_size})), seq_len).block
    return 3 * (config.num_layers * block.flops / seq_len + config.hidden_dim * vocab_size)


def count_block(block: Block, hidden_dim: int, seq_len: int) -> BlockCount:
    """Return the FLOPs of one block over `seq_len` tokens from the modules it is made of."""
    projection = elementwise = 0
    for module in block.modules():
        match module:
            case MemoryLayer():
                projection += module.hash.num_tables * module.out_features
                elementwise += module.in_features * _HASH_OPS
                elementwise += module.out_features if module.bias is not None else 0
            case nn.Linear():
                projection += module.in_features * module.out_features
                elementwise += module.out_features if module.bias is not None else 0
            case nn.RMSNorm():
                elementwise += module.normalized_shape[0] * _RMS_NORM_OPS
            case nn.LayerNorm():
                elementwise += module.normalized_shape[0] * _LAYER_NORM_OPS
    elementwise += 2 * hidden_dim  # residual sums
    elementwise += 2 * block.num_heads * block.rotary_dim * _ROTARY_OPS
    return BlockCount(
        seq_len=seq_len,
        projection_flops=projection * seq_len,
        attention_flops=2 * seq_len * seq_len * hidden_dim,
        elementwise_flops=elementwise * seq_len,
    )


def _tables(model: nn.Module) -> list[Table]:
    return [module for module in model.modules() if isinstance(module, Table)]

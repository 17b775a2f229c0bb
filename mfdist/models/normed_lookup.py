"""A memory layer with its norm before and the residual sum after it: at decode on a GPU, one step.

At decode each of those would be a kernel that takes about as long as the lookup. Around lookups of many tokens the
compiler makes better ones, and a CPU is as fast one after the other.
"""

import torch
from torch import Tensor, nn

from mfdist.kernels import Norm, hashed_gather_sum
from mfdist.layers import MemoryLayer
from mfdist.table import autocast_dtype


def normed_lookup(
    norm: nn.RMSNorm | nn.LayerNorm, layer: MemoryLayer, x: Tensor, *, residual: Tensor | None = None
) -> Tensor:
    """Return layer(norm(x)), plus the residual where one is given.

    Args:
        norm: over the last dimension of x.
        layer: of as many features.
        x: [B, T, in_features].
        residual: [B, T, out_features] in x's dtype.
    """
    rows = layer.table.resident_rows if _is_one_step(norm, layer, x) else None
    if rows is None or any(each is not None and each.dtype != x.dtype for each in (rows, norm.weight, layer.bias)):
        out: Tensor = layer(norm(x))
        return out if residual is None else residual + out
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    shift = norm.bias if isinstance(norm, nn.LayerNorm) else None
    out = hashed_gather_sum(
        rows,
        x.reshape(-1, layer.in_features),
        layer.hash.bits,
        layer.hash.score,
        layer.hash.temperature,
        layer.table.spec.name,
        norm=Norm(isinstance(norm, nn.LayerNorm), eps, norm.weight, shift),
        bias=layer.bias,
        residual=None if residual is None else residual.reshape(-1, layer.out_features),
    )
    return out.view(*x.shape[:-1], layer.out_features)


def _is_one_step(norm: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    """Return whether nothing but the result is wanted of the modules: no gradients, no hooks, no other dtype."""
    if not x.is_cuda or x.shape[1] != 1 or torch.is_grad_enabled() or autocast_dtype(x.device) is not None:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in (norm, layer))

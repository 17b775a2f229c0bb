"""What stands where a linear layer stood: activations brought to mean 0 and deviation 1, then a memory layer."""

import torch
from torch import Tensor, nn

from mfdist.layers import MemoryLayer


class ConvertedLinear(nn.Module):
    """A memory layer behind a fixed shift and scale of each activation.

    Sign bits tell nothing of activations that are hardly ever negative, as those after a GELU or with a large mean; so
    each is centred first, at the cost of one subtraction and one product.

    Args:
        memory: the memory layer.
    """

    shift: Tensor
    inverse_scale: Tensor

    def __init__(self, memory: MemoryLayer) -> None:
        super().__init__()
        like = memory.bias if memory.bias is not None else next(memory.parameters())
        self.register_buffer("shift", torch.zeros(memory.in_features, dtype=like.dtype, device=like.device))
        self.register_buffer("inverse_scale", torch.ones(memory.in_features, dtype=like.dtype, device=like.device))
        self.memory = memory
        self.in_features, self.out_features = memory.in_features, memory.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Return the output [..., out_features] of [..., in_features]; see `MemoryLayer.forward`.

        The argument has the name that `nn.Linear` gives it, for code that calls by keyword.
        """
        out: Tensor = self.memory((input - self.shift) * self.inverse_scale)
        return out

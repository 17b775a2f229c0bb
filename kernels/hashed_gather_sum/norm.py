"""What activations go through before they are hashed: RMSNorm or LayerNorm, as data."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm


class Norm(NamedTuple):
    """RMSNorm, z = x / √(mean(x²) + eps), or LayerNorm, which takes the mean off x first; then z · weight + shift.

    Statistics and values are computed in fp32 (fp64 in fp64) and rounded to x's dtype once, at the end.
    """

    #: Whether the mean is taken off.
    is_centred: bool
    eps: float
    #: [d], or None for 1.
    weight: Tensor | None = None
    #: [d], or None for 0; LayerNorm's bias.
    shift: Tensor | None = None


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """Return activations [N, d] after the norm, in x's dtype."""
    width = x.shape[1:]
    if norm.is_centred:
        return layer_norm(x, width, norm.weight, norm.shift, norm.eps)
    z = rms_norm(x, width, norm.weight, norm.eps)
    return z if norm.shift is None else z + norm.shift

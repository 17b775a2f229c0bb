"""one_token_attention as a torch operator, which writes to the cache it is given; it has no gradient."""

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.one_token_attention import reference

#: What the GPU's kernel reads, and the widest head that a program holds; all else is torch's.
MAX_HEAD_WIDTH = 256
_READ = (torch.float32, torch.float16, torch.bfloat16)

torch.library.define(
    "mfdist::one_token_attention",
    "(Tensor qkv, Tensor cosine, Tensor sine, Tensor(a!) keys, Tensor(b!) values, SymInt length, "
    "Tensor? residual=None) -> Tensor",
    tags=torch.Tag.flexible_layout,  # or the compiler copies the angles, made once, for every layer
)
_one_token_attention = torch.ops.mfdist.one_token_attention.default


def one_token_attention(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the attention of one new token of each sequence over its earlier ones and itself; fill the cache.

    The leading 2·F columns of its queries and keys are rotated in pairs (i, i + F); its keys and values are written to
    position `length` of the cache; then softmax(q·kᵀ / √E)·v over positions 0 to `length`.

    Args:
        qkv: [B, 1, 3·H·E], queries, keys and values of all heads one after another.
        cosine, sine: [B or 1, 1, 1, F], fp32 or qkv's dtype, of the rotation; 2·F is at most E, and F may be 0.
        keys, values: [B, H, capacity, E] in qkv's dtype, contiguous; written to.
        length: tokens in the cache, less than its capacity.
        residual: [B, 1, H·E] in qkv's dtype, added to the result.

    Returns:
        [B, 1, H·E] in qkv's dtype, heads concatenated; summed in fp32 on a GPU. It is for inference: no gradient.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together; nothing was written.

    Cost: 2·B·H·length·E elements read. On a GPU one kernel, or two where sequences are long.
    """
    _check(qkv, cosine, sine, keys, values, length, residual)
    out: Tensor = _one_token_attention(qkv, cosine, sine, keys, values, length, residual)
    return out


def _check(
    qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, length: int, residual: Tensor | None
) -> None:
    given = f"got {list(qkv.shape)} in {qkv.dtype} on {qkv.device}"
    if keys.ndim != 4 or keys.shape != values.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise ConfigError(
            "a cache must be contiguous keys and values [B, H, capacity, E]; got "
            f"{list(keys.shape)} and {list(values.shape)}"
        )
    num_sequences, num_heads, capacity, head_dim = keys.shape
    shape = (num_sequences, 1, num_heads * head_dim)
    if qkv.shape != (num_sequences, 1, 3 * shape[2]) or not qkv.is_floating_point():
        raise ConfigError(
            f"qkv must be [B, 1, 3 · H · E] = {[num_sequences, 1, 3 * shape[2]]} as the cache is; {given}"
        )
    half, leading = head_dim // 2, cosine.shape[:-1]
    if cosine.shape != sine.shape or leading not in ((1, 1, 1), (num_sequences, 1, 1)) or cosine.shape[-1] > half:
        raise ConfigError(
            f"cosine and sine must be [{num_sequences} or 1, 1, 1, at most {half}]; got {list(cosine.shape)} and "
            f"{list(sine.shape)}"
        )
    if residual is not None and residual.shape != shape:
        raise ConfigError(f"the residual must be {list(shape)}; got {list(residual.shape)}")
    for other in (keys, values, qkv if residual is None else residual):
        if other.dtype != qkv.dtype or other.device != qkv.device:
            raise ConfigError(
                f"the cache and the residual must be as qkv is; {given} and {other.dtype} on {other.device}"
            )
    if not 0 <= length < capacity:
        raise ConfigError(f"the sequence must fit the cache; got {length + 1} tokens, capacity {capacity}")


torch.library.impl("mfdist::one_token_attention", "CPU", reference.one_token_attention)


@torch.library.impl("mfdist::one_token_attention", "CUDA")
def _on_gpu(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    residual: Tensor | None = None,
) -> Tensor:
    if qkv.dtype not in _READ or keys.shape[-1] > MAX_HEAD_WIDTH or not qkv.numel():
        return reference.one_token_attention(qkv, cosine, sine, keys, values, length, residual)
    made: Tensor = implementation.on_gpu("one_token_attention").one_token_attention(
        qkv, cosine, sine, keys, values, length, residual
    )
    return made


@torch.library.register_fake("mfdist::one_token_attention")
def _shape_of(qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, *others: object) -> Tensor:
    return qkv.new_empty(keys.shape[0], 1, keys.shape[1] * keys.shape[3])

"""row_products as a torch operator: dispatch by device and shapes for the compiler; it has no gradient."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.kernels import implementation
from mfdist.kernels.forward_mode import refuse_tangents
from mfdist.kernels.row_products import reference

#: What the CPU's kernel reads; all else is torch's.
_READ = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define("mfdist::row_products", "(Tensor rows, Tensor x) -> Tensor")
_row_products = torch.ops.mfdist.row_products.default


def row_products(rows: Tensor, x: Tensor) -> Tensor:
    """Return the product of every row with one vector: `F.linear` for a single token, at the memory's speed on a CPU.

    Args:
        rows: [R, D], a floating dtype.
        x: [D], in the same dtype.

    Returns:
        [R] in that dtype, summed in fp32 (fp64 in fp64). On a CPU in an order that depends on D alone: neither on the
        number of threads nor on the processor. It is for inference: a backward through it is an error.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together.
        NotImplementedError: by a backward, or where a tensor carries a tangent of forward-mode differentiation.

    Cost: R·D elements read.
    """
    if rows.ndim != 2 or x.shape != rows.shape[1:] or x.dtype != rows.dtype or x.device != rows.device:
        raise ConfigError(
            f"row_products takes rows [R, D] and x [D] of one dtype and device; got {list(rows.shape)} in {rows.dtype} "
            f"on {rows.device} and {list(x.shape)} in {x.dtype} on {x.device}"
        )
    if not rows.is_floating_point():
        raise ConfigError(f"row_products takes floating-point rows; got {rows.dtype}")
    refuse_tangents("row_products", rows, x)
    out: Tensor = _row_products(rows, x)
    return out


@torch.library.impl("mfdist::row_products", "CPU")
def _on_cpu(rows: Tensor, x: Tensor) -> Tensor:
    if rows.dtype not in _READ:
        return reference.row_products(rows, x)
    made: Tensor = implementation.on_cpu("row_products").row_products(rows, x)
    return made


@torch.library.impl("mfdist::row_products", "CUDA")
def _on_gpu(rows: Tensor, x: Tensor) -> Tensor:
    return reference.row_products(rows, x)


@torch.library.register_fake("mfdist::row_products")
def _shape_of(rows: Tensor, x: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_gradient(ctx: Any, grad_output: Tensor) -> NoReturn:
    raise NotImplementedError("row_products is for inference and has no backward; call torch.nn.functional.linear")


torch.library.register_autograd("mfdist::row_products", _no_gradient, setup_context=_keep)

"""The part of a dense tensor that one rank holds: how a checkpoint sees a DTensor, as FSDP2 makes of parameters."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from mfdist.checkpoint.grid import num_columns, num_rows
from mfdist.errors import ConfigError
from mfdist.spec import Region

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class DenseShard:
    """A rectangle of a dense tensor, seen as rows × columns: its trailing dimensions laid flat."""

    shape: tuple[int, ...]  # of the whole tensor
    region: Region
    values: Tensor  # those of the region, with as many dimensions as the tensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether a tensor is spread over ranks; costs no import where there can be none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(name: str, tensor: "DTensor") -> DenseShard:
    """Return what this rank holds of a tensor; it aliases the tensor, and its region may be empty.

    Raises:
        ConfigError: what it holds is no rectangle of rows and columns, or a sum that is not complete.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(tensor.shape)
    local = tensor.to_local()
    sizes, begins = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    is_rectangle = sizes[2:] == shape[2:] and (len(shape) == 2 or sizes[1:] == shape[1:])
    if any(placement.is_partial() for placement in tensor.placements) or tuple(local.shape) != tuple(sizes):
        raise ConfigError(
            f"a tensor spread over ranks must be whole or sharded on each; {name!r} is placed as {tensor.placements}; "
            "call redistribute first."
        )
    if not is_rectangle and local.numel():
        raise ConfigError(
            f"a tensor of {len(shape)} dimensions must be sharded along its first one; {name!r} is placed as "
            f"{tensor.placements}; call redistribute first, or save it whole."
        )
    rows, columns = (0, num_rows(shape)), (0, num_columns(shape))
    if shape and local.numel():
        rows = (begins[0], begins[0] + sizes[0])
        if len(shape) == 2:
            columns = (begins[1], begins[1] + sizes[1])
    elif shape:
        rows = (0, 0)
    return DenseShard(shape=shape, region=Region(rows=rows, columns=columns), values=local)


def whole_and_shards(dense: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, DenseShard]]:
    """Tell the tensors that this rank holds all of from its parts of those that are spread over ranks."""
    shards = {name: local_shard(name, tensor) for name, tensor in dense.items() if is_dtensor(tensor)}
    return {name: tensor for name, tensor in dense.items() if name not in shards}, shards

"""What of a step is wanted, and where it goes: whole tables, or the regions one rank holds of them."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mfdist.checkpoint.dtypes import dtype_name
from mfdist.checkpoint.holding import Holding, holdings_of
from mfdist.checkpoint.layout import describe, parse_path
from mfdist.checkpoint.reader import read_parts
from mfdist.checkpoint.series import NotSavedError
from mfdist.checkpoint.state import CheckpointState, TableShard, TableState
from mfdist.checkpoint.step_files import StepFiles, StoredArray
from mfdist.errors import CheckpointError, ConfigError
from mfdist.kernels.huge_pages import in_huge_pages
from mfdist.spec import Region


def load_step(
    files: StepFiles,
    device: torch.device | str,
    tables: Collection[str] | None,
    shards: Mapping[str, Sequence[Region]],
) -> CheckpointState:
    """Load a step into new tensors; see `CheckpointDirectory.load`."""
    stored = files.arrays(files.manifest.arrays)
    by_table: dict[str, dict[str, StoredArray]] = {}
    dense: dict[str, Tensor] = {}
    for path, array in stored.items():
        table, name = parse_path(path)
        if table is None:
            dense[name] = torch.empty(array.grid.shape, dtype=array.dtype, device=device)
        else:
            by_table.setdefault(table, {})[name] = array
    if tables is None:
        tables = () if shards else tuple(by_table)
    if unknown := sorted({*tables, *shards} - by_table.keys()):
        raise NotSavedError(
            f"a table must be in the checkpoint to be loaded; {files.root} has no {_some(unknown)}; "
            f"it has {_some(list(by_table))}."
        )
    target = CheckpointState(
        step=files.manifest.step,
        tables={name: _empty_table(by_table[name], device) for name in by_table if name in tables},
        shards={
            name: [_empty_shard(name, by_table[name], region, device) for region in regions]
            for name, regions in shards.items()
        },
        dense=dense,
        attributes=files.attributes(),
    )
    _fill(files, stored, holdings_of(target))
    return target


def load_step_into(files: StepFiles, target: CheckpointState, *, allow_unused: bool) -> CheckpointState:
    """Fill the tensors of `target`; see `CheckpointDirectory.load_into`."""
    wanted = holdings_of(target)
    held = files.manifest.arrays
    missing = [describe(path) for path in wanted if path not in held]
    unused = [describe(path) for path in held if path not in wanted]
    if missing or (unused and not allow_unused):
        raise CheckpointError(
            f"a checkpoint must fit what it is loaded into; {files.root} lacks {_some(missing)}, and holds "
            f"{_some(unused)} besides; build the model it was saved from, or load the parts that fit."
        )
    stored = files.arrays(wanted)
    for path, holding in wanted.items():
        array = stored[path]
        if (holding.shape, holding.dtype) != (array.grid.shape, array.dtype):
            raise CheckpointError(
                f"an array must have the shape and dtype it was saved with; {describe(path)} is {list(holding.shape)} "
                f"{dtype_name(holding.dtype)}, in {files.root} {list(array.grid.shape)} {dtype_name(array.dtype)}; "
                "build the model it was saved from."
            )
    _fill(files, stored, wanted)
    return CheckpointState(
        step=files.manifest.step,
        tables=target.tables,
        shards=target.shards,
        dense=target.dense,
        attributes=files.attributes(),
    )


def _fill(files: StepFiles, stored: Mapping[str, StoredArray], wanted: Mapping[str, Holding]) -> None:
    read_parts(files, [(stored[path], holding.parts) for path, holding in wanted.items()])


def _empty_table(arrays: Mapping[str, StoredArray], device: torch.device | str) -> TableState:
    made = {name: _empty(array.grid.shape, array.dtype, device) for name, array in arrays.items()}
    return TableState(weight=made.pop("weight"), optimizer=made)


def _empty_shard(
    table: str, arrays: Mapping[str, StoredArray], region: Region, device: torch.device | str
) -> TableShard:
    num_rows, row_dim = arrays["weight"].grid.shape
    made = {}
    for name, array in arrays.items():
        if array.grid.shape not in ((num_rows, row_dim), (num_rows,)):
            raise ConfigError(
                f"only states of one value a row, or one a weight, can be loaded in shards; {name!r} of table "
                f"{table!r} is {list(array.grid.shape)}; load the table whole."
            )
        shape = region.shape[: len(array.grid.shape)]
        made[name] = _empty(shape, array.dtype, device)
    return TableShard(num_rows=num_rows, row_dim=row_dim, region=region, weight=made.pop("weight"), optimizer=made)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return in_huge_pages(torch.empty(tuple(shape), dtype=dtype, device=device))  # rows will be read at random


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"

"""The JSON form of a plan, short enough to be written by hand: what is even, or the table's own, may be left out.

    {"format": "mfdist-plan", "version": 1, "world_size": 8, "tables": [
        {"name": "blocks.0.qkv", "num_rows": 16384, "row_dim": 1536, "dtype": "float32", "kind": "column_wise"},
        {"name": "blocks.0.ffn1", "num_rows": 16384, "row_dim": 640, "dtype": "float32", "kind": "row_wise",
         "owners": [0, 1], "rows": [0, 4096, 16384], "deduplicate": false}]}

`rows` and `columns` are cuts, or a number of even parts; `owners` are all ranks where they are left out.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mfdist.errors import ConfigError
from mfdist.sharding.cuts import Cuts, even_cuts, first_ranks
from mfdist.sharding.table_plan import KINDS, WIRE_DTYPES, TablePlan, dtype_name

if TYPE_CHECKING:
    from mfdist.sharding.plan import ShardingPlan

FORMAT = "mfdist-plan"
VERSION = 1

_DTYPES = {dtype_name(dtype): dtype for dtype in WIRE_DTYPES}
_REQUIRED = {"name": str, "num_rows": int, "row_dim": int, "dtype": str, "kind": str}
_OPTIONAL = {
    "owners": list,
    "rows": (list, int),
    "columns": (list, int),
    "code_stride": int,
    "deduplicate": bool,
    "pooled": bool,
    "forward_dtype": str,
    "backward_dtype": str,
}


def plan_to_json(plan: "ShardingPlan") -> str:
    """Return the document, one line a table; equal plans give equal text."""
    lines = ",\n".join(json.dumps(_written(table, plan.world_size)) for table in plan.tables)
    head = f'"format": "{FORMAT}", "version": {VERSION}, "world_size": {plan.world_size}'
    return f'{{{head}, "tables": [\n{lines}\n]}}\n' if plan.tables else f'{{{head}, "tables": []}}\n'


def plan_from_json(text: str) -> tuple[int, tuple[TablePlan, ...]]:
    """Return (world_size, tables) of a document.

    Raises:
        ConfigError: it is no plan, of another version, or a key or value is wrong.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"a plan must be JSON; {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f'a plan must be a JSON object with "format": "{FORMAT}"; this is something else')
    if document.get("version") != VERSION:
        raise ConfigError(f"this mfdist reads version {VERSION} of plans; got {document.get('version')}; plan again")
    _check_keys(document, {"format": str, "version": int, "world_size": int, "tables": list}, {}, "the plan")
    world_size = document["world_size"]
    if world_size < 1:
        raise ConfigError(f"a plan needs at least one rank; got world_size={world_size}")
    return world_size, tuple(_read(entry, index, world_size) for index, entry in enumerate(document["tables"]))


def _written(table: TablePlan, world_size: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": table.name,
        "num_rows": table.num_rows,
        "row_dim": table.row_dim,
        "dtype": dtype_name(table.dtype),
        "kind": table.kind,
    }
    if table.owners and table.owners != first_ranks(world_size):
        entry["owners"] = table.owners
    for key, cuts, even in zip(("rows", "columns"), (table.row_cuts, table.column_cuts), _evenly(table), strict=True):
        if table.kind == "grid" or cuts != even:
            entry[key] = len(cuts) - 1 if cuts == even else cuts
    if table.code_stride:
        entry["code_stride"] = table.code_stride
    if not table.deduplicate:
        entry["deduplicate"] = False
    if table.pooled:
        entry["pooled"] = True
    for key in ("forward_dtype", "backward_dtype"):
        if getattr(table, key) != table.dtype:
            entry[key] = dtype_name(getattr(table, key))
    return entry


def _evenly(table: TablePlan) -> tuple[Cuts, Cuts]:
    step = table.code_stride or (table.num_rows if table.kind == "table_wise" else 1)
    return (
        even_cuts(table.num_rows, table.num_row_parts, step),
        even_cuts(table.row_dim, table.num_column_parts),
    )


def _read(entry: Any, index: int, world_size: int) -> TablePlan:
    where = f"table {index} of the plan"
    if not isinstance(entry, dict):
        raise ConfigError(f"a table must be a JSON object; got {entry!r} for {where}")
    if isinstance(entry.get("name"), str):
        where = f'table "{entry["name"]}" of the plan'
    _check_keys(entry, _REQUIRED, _OPTIONAL, where)
    kind, num_rows, row_dim = entry["kind"], entry["num_rows"], entry["row_dim"]
    if kind not in KINDS:
        raise ConfigError(f'kind must be one of {", ".join(KINDS)}; got "{kind}" for {where}')
    owners = entry.get("owners")
    ranks = () if kind == "replicated" else first_ranks(world_size) if owners is None else _integers(owners, where)
    stride = entry.get("code_stride", 0)
    step = stride if stride > 0 and num_rows % stride == 0 else num_rows if kind == "table_wise" else 1
    cuts = {}
    for key, size, piece, is_cut in (
        ("rows", num_rows, step, kind in ("row_wise", "table_wise")),
        ("columns", row_dim, 1, kind == "column_wise"),
    ):
        given = entry.get(key, len(ranks) if is_cut else 1)
        if isinstance(given, int) and given < 1:
            raise ConfigError(f"{key} must be cuts or a number of parts, at least 1; got {given} for {where}")
        cuts[key] = even_cuts(size, given, piece) if isinstance(given, int) else _integers(given, where)
    dtype = _dtype(entry["dtype"], where)
    return TablePlan(
        name=entry["name"],
        num_rows=num_rows,
        row_dim=row_dim,
        dtype=dtype,
        kind=kind,
        row_cuts=cuts["rows"],
        column_cuts=cuts["columns"],
        owners=ranks,
        code_stride=stride,
        deduplicate=entry.get("deduplicate", True),
        pooled=entry.get("pooled", False),
        forward_dtype=_dtype(entry["forward_dtype"], where) if "forward_dtype" in entry else dtype,
        backward_dtype=_dtype(entry["backward_dtype"], where) if "backward_dtype" in entry else dtype,
    )


def _check_keys(entry: Mapping[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any], where: str) -> None:
    known = {**required, **optional}
    if missing := [key for key in required if key not in entry]:
        raise ConfigError(f'key "{missing[0]}" is missing in {where}')
    for key, value in entry.items():
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in {where}; keys are {", ".join(known)}')
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            raise ConfigError(f"{key} has the wrong type in {where}; got {value!r}")


def _integers(values: list[Any], where: str) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise ConfigError(f"cuts and owners must be lists of whole numbers; got {values!r} for {where}")
    return tuple(values)


def _dtype(name: str, where: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f'dtype must be one of {", ".join(_DTYPES)}; got "{name}" for {where}')
    return _DTYPES[name]

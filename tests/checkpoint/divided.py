"""States cut over ranks, and the oracle that puts them together again without mfdist's code."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.ranks import StoreRanks
from mfdist.checkpoint.state import CheckpointState, TableShard
from mfdist.spec import Region

KINDS = ("row", "column", "table", "grid")
SHAPES = {"tall": (151, 20), "wide": (40, 96)}
OPTIMIZERS: dict[str, Callable[[int, int], dict[str, tuple[int, ...]]]] = {
    "sgd": lambda rows, columns: {},
    "adagrad": lambda rows, columns: {"sum": (rows,)},
    "adam": lambda rows, columns: {"exp_avg": (rows, columns), "exp_avg_sq": (rows, columns)},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Arrays = dict[str, dict[str, Tensor]]  # table → array → whole values


def whole_arrays(seed: int = 0) -> Arrays:
    """Every optimiser with every dtype, as tables of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    tables: Arrays = {}
    for kind, states in OPTIMIZERS.items():
        for dtype_name, dtype in DTYPES.items():
            for size, shape in SHAPES.items():
                arrays = {"weight": torch.randn(shape, generator=generator).to(dtype)}
                arrays |= {name: torch.randn(dims, generator=generator) for name, dims in states(*shape).items()}
                tables[f"{kind}.{dtype_name}.{size}"] = arrays
    return tables


def regions(kind: str, world_size: int, tables: Arrays) -> list[dict[str, list[Region]]]:
    """Cut tables over ranks, unevenly, so that the cuts meet no file; return each rank's regions."""
    held: list[dict[str, list[Region]]] = [{} for _ in range(world_size)]
    for number, (name, arrays) in enumerate(tables.items()):
        rows, columns = arrays["weight"].shape
        row_cuts, column_cuts = [0, rows], [0, columns]
        if kind in ("row", "grid"):
            row_cuts = _cuts(rows, world_size if kind == "row" else max(1, world_size // 2))
        if kind in ("column", "grid"):
            column_cuts = _cuts(columns, world_size if kind == "column" else min(2, world_size))
        owner = number if kind == "table" else 0
        for top, bottom in pairwise(row_cuts):
            for left, right in pairwise(column_cuts):
                region = Region(rows=(top, bottom), columns=(left, right))
                held[owner % world_size].setdefault(name, []).append(region)
                owner += 1
    return held


def _cuts(size: int, parts: int) -> list[int]:
    return sorted({0, size, *(min(size, size * part // parts + part % 3) for part in range(1, parts))})


def state_of_rank(tables: Arrays, held: dict[str, list[Region]], step: int = 1) -> CheckpointState:
    """What one rank gives to `save`: copies of its rectangles."""
    shards = {}
    for name, mine in held.items():
        shards[name] = [
            TableShard(
                num_rows=tables[name]["weight"].shape[0],
                row_dim=tables[name]["weight"].shape[1],
                region=region,
                weight=_cutout(tables[name]["weight"], region),
                optimizer={key: _cutout(t, region) for key, t in tables[name].items() if key != "weight"},
            )
            for region in mine
        ]
    dense = {"model/bias": torch.arange(5.0), "rng": torch.tensor(step)}  # replicated
    return CheckpointState(step=step, tables={}, dense=dense, attributes={"step": step}, shards=shards)


def _cutout(tensor: Tensor, region: Region) -> Tensor:
    rows = tensor[slice(*region.rows)]
    return (rows[:, slice(*region.columns)] if tensor.ndim == 2 else rows).clone()


def assert_holds(state: CheckpointState, tables: Arrays, held: dict[str, list[Region]]) -> None:
    """Compare a loaded rank with the whole values, bit for bit."""
    assert state.shards.keys() == held.keys()
    for name, mine in held.items():
        assert [shard.region for shard in state.shards[name]] == mine
        for shard in state.shards[name]:
            found = {"weight": shard.weight, **shard.optimizer}
            assert found.keys() == tables[name].keys()
            for key, values in found.items():
                expected = _cutout(tables[name][key], shard.region)
                assert values.dtype == expected.dtype
                assert torch.equal(values, expected), (name, key, shard.region)


def save_in_threads(
    path: Path, states: Sequence[CheckpointState], *, deadline_s: float = 20.0, **options: Any
) -> list[Any]:
    """Save by one thread a rank; return what each got, errors included."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=deadline_s))

    def save(rank: int) -> Any:
        ranks = StoreRanks(store, rank, len(states), deadline_s=deadline_s)
        try:
            return CheckpointDirectory(path, ranks=ranks, **options).save(states[rank])
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return error

    with ThreadPoolExecutor(len(states)) as pool:
        return list(pool.map(save, range(len(states))))


def files_of(step: Path) -> dict[str, bytes]:
    """Everything on disk but the manifest, which has the time of saving."""
    found = (path for path in step.rglob("*") if path.is_file() and path.parent.name != "manifest")
    return {path.relative_to(step).as_posix(): path.read_bytes() for path in found}

"""How far rows have moved since they were drawn, on a sample of each layer's rows.

The first rows are drawn again from the table's seed, so nothing of them is kept but the sample; those of today are read
by a lookup, so it makes no difference where they lie.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mfdist.layers import MemoryLayer
from mfdist.spec import Region
from mfdist.table import Table
from mfdist.tables.initial_rows import TILE_COLUMNS, TILE_ROWS, draw_rows

#: Rows of a layer that are compared, in how many of the tiles that rows are drawn in.
NUM_TILES = 8
ROWS_A_TILE = 32


@dataclass(frozen=True, kw_only=True)
class LayerMovement:
    """How far sampled rows of a layer have moved.

    Args:
        row_ids: [M] of the sample.
        moved: [M], the distance to the first values as a multiple of their norm.
    """

    row_ids: npt.NDArray[np.int64]
    moved: npt.NDArray[np.float64]


class RowMovement:
    """Measures the movement of a model's rows.

    Args:
        model: its tables must be those that are trained. Tables that were not drawn from a seed are left out.

    Cost: 256 KiB a layer; a fraction of a second once, to draw.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = [module.table for module in model.modules() if isinstance(module, MemoryLayer)]
        self._samples = {table.spec.name: _Sample(table) for table in tables if table.seed is not None}

    @torch.no_grad()
    def measure(self) -> dict[str, LayerMovement]:
        """Return the movement of each layer, by its table's name. Called on all ranks."""
        return {name: sample.measure() for name, sample in self._samples.items()}


class _Sample:
    def __init__(self, table: Table) -> None:
        assert table.seed is not None
        spec, device = table.spec, table.get_parameter("weight").device
        num_tiles = -(-spec.num_rows // TILE_ROWS)
        tiles = sorted({index * num_tiles // NUM_TILES for index in range(NUM_TILES)})
        columns = (0, min(spec.row_dim, TILE_COLUMNS))
        ids, first = [], []
        for tile in tiles:
            rows = (tile * TILE_ROWS, min((tile + 1) * TILE_ROWS, spec.num_rows))
            drawn = torch.empty(rows[1] - rows[0], columns[1], dtype=spec.dtype, device=device)
            draw_rows(drawn, spec, Region(rows=rows, columns=columns), table.std, table.seed)
            # By chance, and the same each time: rows at even distances would have codes that share their last bits.
            order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(tile))
            chosen = order[:ROWS_A_TILE].sort().values.to(device)
            ids.append(chosen + rows[0])
            first.append(drawn[chosen].float())
        self._table = table
        self._row_ids = torch.cat(ids)
        self._first = torch.cat(first)

    def measure(self) -> LayerMovement:
        ids = self._row_ids
        rows: Tensor = self._table(ids[:, None], torch.ones(len(ids), 1, device=ids.device))
        distance = (rows[:, : self._first.shape[1]].float() - self._first).norm(dim=1)
        moved = distance / self._first.norm(dim=1).clamp_min(1e-30)
        return LayerMovement(row_ids=ids.cpu().numpy(), moved=moved.double().cpu().numpy())

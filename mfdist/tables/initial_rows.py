"""Drawing a table's first rows: the same values whichever part of the table is drawn, and on how many ranks."""

import torch
from torch import Tensor

from mfdist.spec import Region, TableSpec

#: A table is drawn in tiles, each from a generator of its own, so that a part costs no more than its size.
TILE_ROWS = 1024
TILE_COLUMNS = 256
_SEED_BITS = 63


def new_seed() -> int:
    """Return a seed from torch's default generator on the CPU, which every rank has seeded alike."""
    return int(torch.randint(2**_SEED_BITS - 1, (), device="cpu"))


@torch.no_grad()
def draw_rows(out: Tensor, spec: TableSpec, region: Region, std: float, seed: int) -> None:
    """Fill a part of a table from N(0, std²).

    Args:
        out: [rows, columns] of the region, on any device but meta; values depend on the kind of device.
        spec: the whole table.
        region: which part of it `out` is.
        std: standard deviation.
        seed: decides all values, together with a value's place in the table.
    """
    generator = torch.Generator(out.device)
    tiles_across = -(-spec.row_dim // TILE_COLUMNS)
    for row in range(region.rows[0] // TILE_ROWS, -(-region.rows[1] // TILE_ROWS)):
        for column in range(region.columns[0] // TILE_COLUMNS, -(-region.columns[1] // TILE_COLUMNS)):
            tile = Region(
                rows=(row * TILE_ROWS, min((row + 1) * TILE_ROWS, spec.num_rows)),
                columns=(column * TILE_COLUMNS, min((column + 1) * TILE_COLUMNS, spec.row_dim)),
            )
            generator.manual_seed((seed + (row * tiles_across + column) * _STRIDE) % 2**_SEED_BITS)
            drawn = torch.empty(tile.shape, dtype=torch.float32, device=out.device).normal_(0, std, generator=generator)
            common = tile.intersection(region)
            _part(out, common, region).copy_(_part(drawn, common, tile))


#: An odd number far from small ones, so that neighbouring seeds share no tile.
_STRIDE = 0x9E3779B97F4A7C15 >> 1 | 1


def _part(tensor: Tensor, region: Region, of: Region) -> Tensor:
    """Return the view of `region` in a tensor that holds the region `of`."""
    top, left = of.rows[0], of.columns[0]
    return tensor[region.rows[0] - top : region.rows[1] - top, region.columns[0] - left : region.columns[1] - left]

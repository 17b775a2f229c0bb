"""`MemoryLayer`: lookup tables in place of a linear projection.

Shape letters: N tokens (all leading dimensions together), K tables, D = out_features.
"""

import math

import torch
from torch import Tensor, nn

from mfdist.addressing.sign_hash import SignHash
from mfdist.errors import ConfigError
from mfdist.kernels import hashed_gather_sum
from mfdist.spec import TableSpec
from mfdist.table import Table, autocast_dtype
from mfdist.tables.local import LocalTable


class MemoryLayer(nn.Module):
    """A drop-in for `nn.Linear` that reads K = in_features / bits rows instead of multiplying by a matrix.

    The sign bits of each chunk of `bits` activations address one row of that chunk's table of 2^bits rows; the rows,
    weighted by their scores, add up to the output: y = Σ_k s(z_k) · T_k[code(z_k)] + bias. The table is its only large
    parameter, K·2^bits × out_features; the activations should be roughly zero-mean (put a norm before the layer).

    Args:
        in_features: width of the input, a multiple of `bits`.
        out_features: width of the output.
        bits: sign bits a chunk, 1 to 24; each bit more doubles the table and shortens the sum.
        score: weight of a row: `paper` or `released`, see `SignHash`.
        bias: add a learned bias [out_features].
        temperature: t of the score.
        table: where the rows lie; by default a `LocalTable` made here. It must have K·2^bits rows of out_features.
        name: name of the default table, shown in errors and used in checkpoints.
        std: standard deviation of the default table's initialisation; by default √(2 / (5·in_features)), the released
            code's choice for projections.
        device, dtype: of the parameters made here.
        table_device: of the default table, where it differs; `meta` makes no rows, for `mfdist.shard` to make them.
        table_dtype: of the default table's rows, where it is not `dtype`.

    Raises:
        ConfigError: sizes that do not fit; the message names the nearest that do.

    Source: MemoryFormer (arXiv 2411.12992), equation 11.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        score: str = "paper",
        bias: bool = True,
        *,
        temperature: float = 1.0,
        table: Table | None = None,
        name: str = "memory",
        std: float | None = None,
        device: torch.device | str | None = None,
        table_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        table_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.hash = SignHash(in_features=in_features, bits=bits, score=score, temperature=temperature)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if table is None:
            spec = TableSpec(name=name, num_rows=self.hash.num_rows, row_dim=out_features, dtype=table_dtype or dtype)
            std = math.sqrt(2 / (5 * in_features)) if std is None else std
            table = LocalTable(spec, std=std, device=device if table_device is None else table_device)
        elif (table.spec.num_rows, table.spec.row_dim) != (self.hash.num_rows, out_features):
            raise ConfigError(
                f"the table must have in_features/bits·2^bits rows of out_features; got {table.spec.num_rows} × "
                f'{table.spec.row_dim} in "{table.spec.name}"; needed {self.hash.num_rows} × {out_features}'
            )
        self.table = table
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias anew; the table draws its own rows."""
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            x: [..., in_features], fp32, fp16 or bf16; on the CPU also fp64, where the rows are.

        Returns:
            [..., out_features] in x's dtype, or in autocast's where that is on and x not fp64.

        Cost: N·K·D elements of the table read once.
        """
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ConfigError(
                f"the last dimension of x must be in_features={self.in_features}; got x of shape {tuple(x.shape)}"
            )
        dtype = autocast_dtype(x.device, x.dtype)
        # As in a linear layer under autocast. Rounding to bf16 changes no code; fp16 has no numbers below 3e-8, whose
        # sign it loses.
        out = self._look_up(x.reshape(-1, self.in_features).to(dtype or x.dtype)).to(dtype or x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _look_up(self, x: Tensor) -> Tensor:
        """Return the lookup of activations [N, d]; where no gradient is wanted and the rows are here, in one step."""
        addressing = self.hash
        rows = None if torch.is_grad_enabled() else self.table.resident_rows
        if rows is not None:
            settings = (addressing.bits, addressing.score, addressing.temperature)
            return hashed_gather_sum(rows, x, *settings, self.table.spec.name)
        codes, scores = addressing(x)
        out: Tensor = self.table(codes, scores, code_stride=addressing.code_stride)
        return out

    def extra_repr(self) -> str:
        """Return the sizes as shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.hash.bits}, "
            f"num_tables={self.hash.num_tables}, score={self.hash.score}, bias={self.bias is not None}"
        )

"""A table of which this rank holds a part; the exchange with the other ranks is hidden in its lookup."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mfdist.errors import ConfigError
from mfdist.kernels.huge_pages import in_huge_pages
from mfdist.kernels.row_id_check import kept as bad_ids_kept
from mfdist.kernels.row_id_check import met_error
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.routes.planned import check_mesh, route_of
from mfdist.sharding.routes.route import Kept, LookupArguments, RowGradient
from mfdist.sharding.table_plan import TablePlan
from mfdist.spec import Region
from mfdist.table import Table, autocast_dtype
from mfdist.tables.initial_rows import draw_rows, new_seed


class ShardedTable(Table):
    """A table spread over the ranks of a mesh as a plan says.

    Every rank looks up for its own tokens, as many or as few as it has, and gets what an unsharded table would give.
    All ranks must make the same lookups and backward passes in the same order. Ranks are taken to hold equal shares of
    the batch, as DDP takes them: where each rank's loss is the mean over its tokens, `weight.grad` is the held rows'
    gradient of the mean over all ranks, and score gradients are those of the rank's own loss.

    Row-wise and column-wise, sums and row gradients have the bits of an unsharded table in fp32 on a CPU that is given
    all ranks' tokens one rank after the other; other kinds agree up to rounding, and all repeat bit for bit.

    Where columns are cut, SGD and Adam leave a row whose gradient is not finite as it is in the columns of those ranks
    alone whose gradient is not; row-wise Adagrad, which needs whole rows' squares, leaves all of it.

    Args:
        plan: of this table.
        exchanges: over the mesh; shared by all tables.
        std: standard deviation of the rows' normal initialisation.
        device: where the rows are made; `meta` makes none.
        seed: of the rows' first values; by default a new one, as `reset_parameters` takes.

    Raises:
        ConfigError: the plan does not fit the mesh; no rank was spoken to.
    """

    def __init__(
        self,
        plan: TablePlan,
        exchanges: MeshExchanges,
        *,
        std: float = 0.02,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(plan.spec)
        check_mesh(plan, exchanges.shape)
        self.plan = plan
        self.std = std
        self.exchanges = exchanges
        self._route = route_of(plan, exchanges)
        for exchange in exchanges.all:
            exchange.know(plan.name, plan.kind)
        rows = torch.empty(self.region.shape, dtype=plan.dtype, device=device)
        self.weight = nn.Parameter(in_huge_pages(rows))
        self._draw(new_seed() if seed is None else seed)

    @property
    def region(self) -> Region:
        """Return the part of the table that `weight` is."""
        return self.plan.region_of(self.exchanges.rank)

    def reset_parameters(self) -> None:
        """Draw the held rows anew from N(0, std²); the values are those of an unsharded table after the same seed."""
        self._draw(new_seed())
        if self.row_state is not None:
            self.row_state.reset()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the lookup; see `Table.forward`.

        Raises:
            RowIdError: an id of this rank lies outside the table.
            ConsistencyError: another rank makes another lookup, or has an id outside the table.
            UnavailableError: a rank did not come before the deadline; it is named. A replicated table's lookup asks
                nobody: where one rank has a bad id, the others learn in backward that it does not come.

        Called on: all ranks of the mesh, in the same order for all tables.
        """
        weight: Tensor = self.weight
        if weight.is_meta:
            raise ConfigError(
                f'table "{self.spec.name}" must have rows to look up; it is still on the meta device; call '
                "model.to_empty(device=…) and reset_parameters, or load a checkpoint"
            )
        dtype = autocast_dtype(weight.device, weight.dtype) or weight.dtype
        state = self.row_state
        # Rows that backward updates are read as they are; a copy in another dtype would be the part's size.
        weight, anchor = (weight.to(dtype), None) if state is None else (weight, state.anchor)
        is_training = torch.is_grad_enabled() and (state is not None or weight.requires_grad or scores.requires_grad)
        out: Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            weight, scores, anchor, row_ids, code_stride, dtype, self, is_training
        )
        return out.to(dtype)

    def extra_repr(self) -> str:
        """Return the spec, the kind of sharding and the part held."""
        rows, columns = self.region.rows, self.region.columns
        held = f"rows [{rows[0]}, {rows[1]}), columns [{columns[0]}, {columns[1]})"
        return f"{super().extra_repr()}, {self.plan.kind}, {held}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let spec and plan follow a cast of the rows; sums and gradients travel as they did."""
        applied = super()._apply(fn, recurse)
        self.plan = replace(self.plan, dtype=self.weight.dtype)
        self.spec = self.plan.spec
        return applied

    def _draw(self, seed: int) -> None:
        self.seed = seed
        if not self.weight.is_meta:
            draw_rows(self.weight, self.spec, self.region, self.std, seed)


class _Lookup(torch.autograd.Function):
    """The route's lookup and gradient as autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor,
        anchor: Tensor | None,
        row_ids: Tensor,
        code_stride: int,
        dtype: torch.dtype,
        table: ShardedTable,
        is_training: bool,
    ) -> Tensor:
        lookup = LookupArguments(row_ids, scores, code_stride, dtype, met_error())
        with bad_ids_kept():
            out, kept = table._route.forward(weight, lookup, is_training=is_training)
        if is_training:
            # The count of updates is kept for autograd to see, on ranks without rows too, that there was none since.
            ctx.save_for_backward(weight, table.row_state and table.row_state.count, *kept.tensors)
            ctx.others, ctx.table = kept.others, table
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, _, *tensors = ctx.saved_tensors
        table: ShardedTable = ctx.table
        kept, world_size = Kept(tuple(tensors), ctx.others), table.exchanges.world_size
        # Scaled before it is summed: fewer values than after, and rounded as an unsharded table's is.
        grad = _over(grad_output, world_size, weight.dtype)
        with bad_ids_kept():
            if table.row_state is not None:
                rows, grad_scores = None, table._route.update(weight, kept, grad, table.row_state)
            else:
                gradient, grad_scores = table._route.backward(weight, kept, grad)
                rows = _dense(gradient, weight)
        grad_scores = grad_scores * world_size if world_size > 1 else grad_scores
        return rows, grad_scores, None, None, None, None, None, None


def _over(grad: Tensor, world_size: int, dtype: torch.dtype) -> Tensor:
    """Return a gradient over the number of ranks, in `dtype` where its own would round it.

    A power of two changes the exponent alone, for which fp16 has too few; bf16 has as many as fp32.
    """
    if world_size == 1:
        return grad
    is_exact = world_size & (world_size - 1) == 0 and grad.dtype != torch.float16
    return grad / world_size if is_exact else grad.to(dtype) / world_size


def _dense(gradient: RowGradient, weight: Tensor) -> Tensor:
    if gradient.row_ids is None:
        return gradient.values
    dense = torch.zeros_like(weight)
    if weight.numel():
        dense[gradient.row_ids] = gradient.values
    return dense

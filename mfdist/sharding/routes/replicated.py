"""Replicated: every rank looks up in its own copy; only the row gradients travel, to be summed."""

from itertools import pairwise

import torch
from torch import Tensor

from mfdist.optim import RowState
from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.routes.column_wise import sum_in_order
from mfdist.sharding.routes.local import LocalRoute
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.tags import Call
from mfdist.sharding.under_way import Opened
from mfdist.sharding.wire import Wire


class Replicated(Route):
    """Each rank adds up the gradients of its share of the rows, in the order of the ranks, and sends the sums to all.

    Args:
        name: the table's.
        exchange: among all ranks that have a copy.
        backward_wire: what gradients travel as.

    Bytes sent a rank: nothing forward, 2·R·D·b·(W − 1)/W backward.
    """

    def __init__(self, name: str, exchange: Exchange, backward_wire: torch.dtype) -> None:
        self._name = name
        self._exchange = exchange
        self._wire = backward_wire
        self._local = LocalRoute(name)

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`. Nobody waits for a rank that refuses."""
        if lookup.refusal is not None:
            raise lookup.refusal
        return self._local.forward(weight, lookup, is_training=is_training)

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        opened = self._open("update" if must_list else "gradient")
        own, grad_scores = self._local.backward(weight, kept, grad_output, must_list=must_list)
        if not must_list:
            total = self._sum(opened, own.values, self._wire)
            opened.wait()
            return RowGradient(total), grad_scores
        assert own.row_ids is not None
        dense = own.values.new_zeros(weight.shape)
        dense[own.row_ids] = own.values
        is_used = torch.zeros(weight.shape[0], 1, dtype=torch.uint8, device=weight.device)
        is_used[own.row_ids] = 1
        # Rounding sums to the rows' own dtype would cost what summing them in fp32 has gained.
        wire = self._wire if self._wire.itemsize < weight.dtype.itemsize else dense.dtype
        total = self._sum(opened, dense, wire)
        rows = self._sum(opened, is_used, torch.uint8).squeeze(1).nonzero().squeeze(1)
        opened.wait()
        return RowGradient(total[rows], rows), grad_scores

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows, each copy alike; see `Route.update`."""
        gradient, grad_scores = self.backward(weight, kept, grad_output, must_list=True)
        state.update(weight, gradient.values, touched=gradient.row_ids, name=self._name)
        return grad_scores

    def _open(self, phase: str) -> Opened:
        return self._exchange.open(Call(table=self._name, kind="replicated", phase=phase))

    def _sum(self, opened: Opened, values: Tensor, wire_dtype: torch.dtype) -> Tensor:
        """Return [R, D] summed over the ranks in their order; of bytes, whether any is not 0."""
        exchange, wire = self._exchange, Wire(values.dtype, wire_dtype)
        num_rows, row_dim = values.shape
        counts = [end - begin for begin, end in pairwise(even_cuts(num_rows, exchange.world_size))]
        width, own = wire.width(row_dim), counts[exchange.rank]
        sizes, own_sizes = [count * width for count in counts], [own * width] * exchange.world_size
        arrived = exchange.swap(opened, wire.encode(values), sizes, own_sizes, max(sizes))
        shares = wire.decode(arrived.view(exchange.world_size * own, width)).view(exchange.world_size, own, row_dim)
        total = sum_in_order(shares.unbind()) if values.is_floating_point() else shares.amax(0)
        repeated = wire.encode(total).repeat(exchange.world_size, 1)
        summed = exchange.swap(opened, repeated, own_sizes, sizes, max(sizes))
        return wire.decode(summed.view(num_rows, width))

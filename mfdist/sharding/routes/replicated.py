"""Replicated: every rank looks up in its own copy; only the row gradients travel, to be summed."""

from itertools import pairwise

import torch
from torch import Tensor

from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.routes.column_wise import sum_in_order
from mfdist.sharding.routes.local import LocalRoute
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.tags import Call
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
        """Return the sums; see `Route.forward`."""
        return self._local.forward(weight, lookup, is_training=is_training)

    def backward(self, weight: Tensor, kept: Kept, grad_output: Tensor) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        exchange, wire = self._exchange, Wire(weight.dtype, self._wire)
        opened = exchange.open(Call(table=self._name, kind="replicated", phase="gradient"))
        own_gradient, grad_scores = self._local.backward(weight, kept, grad_output)
        num_rows, row_dim = weight.shape
        cuts = even_cuts(num_rows, exchange.world_size)
        counts = [end - begin for begin, end in pairwise(cuts)]
        width, own = wire.width(row_dim), counts[exchange.rank]
        sizes, own_sizes = [count * width for count in counts], [own * width] * exchange.world_size
        arrived = exchange.send(opened, wire.encode(own_gradient.values), sizes, own_sizes, max(sizes)).wait()
        shares = wire.decode(arrived.view(exchange.world_size * own, width))
        total = sum_in_order(shares.view(exchange.world_size, own, row_dim))
        summed = exchange.send(
            opened, wire.encode(total).repeat(exchange.world_size, 1), own_sizes, sizes, max(sizes)
        ).wait()
        opened.wait()
        return RowGradient(wire.decode(summed.view(num_rows, width))), grad_scores

"""Replicated: every rank looks up in its own copy; only the row gradients travel, to be summed."""

from itertools import pairwise

import torch
from torch import Tensor

from mfdist.kernels.row_update import squared_sums
from mfdist.optim import RowState
from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.packing import Part
from mfdist.sharding.routes.column_wise import sum_in_order
from mfdist.sharding.routes.local import LocalRoute
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.tags import Call
from mfdist.sharding.under_way import Opened
from mfdist.sharding.wire import Wire
from mfdist.sharding.workload import reads_most_rows


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
        """Return the sums; see `Route.forward`. No other rank is told of a refusal here."""
        if lookup.refusal is not None:
            raise lookup.refusal
        return self._local.forward(weight, lookup, is_training=is_training)

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        if must_list:
            total, is_used, grad_scores = self._marked_sums(weight, kept, grad_output)
            rows = is_used.nonzero().squeeze(1)
            return RowGradient(total[rows], rows), grad_scores
        opened = self._open("gradient")
        own, grad_scores = self._local.backward(weight, kept, grad_output)
        total = self._sum(opened, own.values, self._wire)
        opened.wait()
        return RowGradient(total), grad_scores

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows, each copy alike; see `Route.update`."""
        total, is_used, grad_scores = self._marked_sums(weight, kept, grad_output)
        # A mean of squares that is not finite leaves its row as it is.
        mean_squares = (squared_sums(total) / total.shape[1]).masked_fill(~is_used, torch.inf)
        state.update(weight, total, mean_squares=mean_squares, name=self._name)
        return grad_scores

    def _marked_sums(self, weight: Tensor, kept: Kept, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of all rows [R, D], which of them any rank has read [R], and the scores' gradients."""
        opened = self._open("update")
        if reads_most_rows(kept.tensors[0].numel(), weight.shape[0]):
            dense, is_read, grad_scores = self._local.marked(weight, kept, grad_output)
        else:
            own, grad_scores = self._local.backward(weight, kept, grad_output, must_list=True)
            dense = own.values.new_zeros(weight.shape)
            dense[own.row_ids] = own.values
            is_read = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            is_read[own.row_ids] = True
        # Rounding sums to the rows' own dtype would cost what summing them in fp32 has gained.
        wire = self._wire if self._wire.itemsize < weight.dtype.itemsize else dense.dtype
        total = self._sum(opened, dense, wire)
        is_used = self._sum(opened, is_read.view(torch.uint8)[:, None], torch.uint8)
        opened.wait()
        return total, is_used.squeeze(1).bool(), grad_scores

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
        del arrived, shares  # each as large as the table
        encoded = [wire.encode(total).view(-1)] * exchange.world_size
        part = Part(pieces=encoded, arriving=sizes, largest=max(sizes))
        (summed,) = exchange.send_together(opened, [part], is_beside=False).wait()
        return wire.decode(summed.view(num_rows, width))

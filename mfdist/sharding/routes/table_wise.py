"""Table-wise: every rank sums its slots for all tokens; the partial sums are added up where the tokens are.

Forward: codes and scores of each slot go to its owner, partial sums come back.
Backward: the gradient goes to all owners, the score gradients of their slots come back.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mfdist.optim import RowState
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.packing import Part
from mfdist.sharding.routes.checks import note_ids, refusal_of
from mfdist.sharding.routes.column_wise import sum_in_order
from mfdist.sharding.routes.local import LocalRoute
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.routes.token_counts import TokenCounts
from mfdist.sharding.under_way import Opened
from mfdist.sharding.wire import Wire


class TableWise(Route):
    """Partial sums are added in the order of the ranks: repeatable, and an unsharded table's up to rounding.

    Args:
        name: the table's.
        rows: [begin, end) of each rank's rows; empty where it has none.
        row_dim: D, of all of them.
        exchange: among the ranks that share the rows.
        otherwise: what takes lookups whose slots do not lie on one rank each, such as those by row ids.
        wires: what partial sums travel as, and gradients.

    Bytes sent a rank: n·K·(i + s)·(W − 1)/W + n·D·b·(W − 1) forward, n·D·b·(W − 1) + n·K·s·(W − 1)/W backward.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[tuple[int, int]],
        row_dim: int,
        exchange: Exchange,
        otherwise: Route,
        wires: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self._name = name
        self._rows = tuple(rows)
        self._row_dim = row_dim
        self._owners = [int(end > begin) for begin, end in rows]  # a rank without rows has nothing to add
        self._num_rows = max(end for _, end in rows)
        self._exchange = exchange
        self._otherwise = otherwise
        self._forward_wire, self._backward_wire = wires
        self._local = LocalRoute(name)
        self._token_counts = TokenCounts()

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        slots = self._slots(lookup)
        if slots is None:
            out, kept = self._otherwise.forward(weight, lookup, is_training=is_training)
            return out, Kept(kept.tensors, (None, kept.others))
        call = lookup.call(self._name, "table_wise")
        refusal = refusal_of(lookup, self._num_rows, weight, self._name)
        opened = self._exchange.open(call, [lookup.num_tokens], refusal=refusal)
        look_up = partial(self._look_up, opened, weight, slots, is_training=is_training)
        return self._token_counts.make(opened, lookup, weight.dtype, look_up)

    def _look_up(
        self,
        opened: Opened,
        weight: Tensor,
        slots: list[tuple[int, int]],
        lookup: LookupArguments,
        num_tokens: list[int],
        *,
        is_training: bool,
    ) -> tuple[Tensor, Kept]:
        """Return the sums, given how many tokens each rank has."""
        exchange, wire = self._exchange, Wire(weight.dtype, self._forward_wire)
        if not self._owners[exchange.rank]:
            note_ids(lookup, self._num_rows, self._name)
        everyone = self._dispatch(opened, lookup, num_tokens, slots)
        sums, kept = self._local.forward(weight, everyone, is_training=is_training)
        width = wire.width(self._row_dim)
        owners = self._owners
        is_owner = owners[exchange.rank]
        returned = exchange.lend_pieces(
            opened,
            wire.encode(sums if is_owner else sums[:0]).view(-1),
            [count * width * is_owner for count in num_tokens],
            [lookup.num_tokens * width * each for each in owners],
            max(num_tokens) * width,
        )
        shares = [part.view(lookup.num_tokens, width) for part, each in zip(returned, owners, strict=True) if each]
        out = sum_in_order([wire.decode(share) for share in shares])
        return out, Kept(kept.tensors, (opened.call, num_tokens, slots, kept.others))

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        if kept.others[0] is None:
            below = Kept(kept.tensors, kept.others[1])
            return self._otherwise.backward(weight, below, grad_output, must_list=must_list)
        opened = self._exchange.open(replace(kept.others[0], phase="gradient"))
        everyones, local = self._dispatch_gradient(opened, weight, kept, grad_output)
        row_gradient, slot_gradients = self._local.backward(weight, local, everyones, must_list=must_list)
        return row_gradient, self._combine(opened, kept, slot_gradients)

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows; see `Route.update`."""
        if kept.others[0] is None:
            return self._otherwise.update(weight, Kept(kept.tensors, kept.others[1]), grad_output, state)
        opened = self._exchange.open(replace(kept.others[0], phase="update"))
        everyones, local = self._dispatch_gradient(opened, weight, kept, grad_output, is_update=True)
        return self._combine(opened, kept, self._local.update(weight, local, everyones, state))

    def _dispatch_gradient(
        self, opened: Opened, weight: Tensor, kept: Kept, grad_output: Tensor, *, is_update: bool = False
    ) -> tuple[Tensor, Kept]:
        """Send all owners the gradient; return that of all tokens, and what the lookup leaves for it.

        On a GPU the lookups of an update are put in order while these travel.
        """
        _, num_tokens, _, stride = kept.others
        exchange, wire = self._exchange, Wire(weight.dtype, self._backward_wire)
        own, width, owners = num_tokens[exchange.rank], wire.width(self._row_dim), self._owners
        is_owner = owners[exchange.rank]
        encoded = wire.encode(grad_output).view(-1)
        sizes = [own * width * each for each in owners], [count * width * is_owner for count in num_tokens]
        numbers = (wire.payload_dtype, *sizes, max(num_tokens) * width)
        local = Kept(kept.tensors, stride)

        def order() -> None:
            nonlocal local
            local = self._local.ordered(weight, local)

        if is_update and exchange.is_hasty:
            nothing = encoded[:0]
            lent = exchange.lend_made(
                opened, lambda rank: encoded if owners[rank] else nothing, *numbers, meanwhile=order
            )
        else:
            lent = exchange.lend(opened, lambda rank, part: part.copy_(encoded), *numbers)
        return wire.decode(lent.joined().view(sum(num_tokens) * is_owner, width)), local

    def _combine(self, opened: Opened, kept: Kept, slot_gradients: Tensor) -> Tensor:
        """Send each rank the score gradients of this rank's slots; return all of this rank's tokens'."""
        call, num_tokens, slots, _ = kept.others
        exchange, own = self._exchange, num_tokens[self._exchange.rank]
        widths = [end - begin for begin, end in slots]
        returned = exchange.swap(
            opened,
            slot_gradients,
            [count * widths[exchange.rank] for count in num_tokens],
            [own * each for each in widths],
            max(num_tokens) * max(widths),
        )
        opened.wait()
        grad_scores = returned.new_zeros(own, call.num_lookups)
        for (begin, end), part in zip(slots, returned.split_with_sizes([own * each for each in widths]), strict=True):
            grad_scores[:, begin:end] = part.view(own, end - begin)
        return grad_scores

    def _slots(self, lookup: LookupArguments) -> list[tuple[int, int]] | None:
        """Return the lookups that each rank's rows answer, or None where they cannot be told by their number."""
        stride, num_lookups = lookup.code_stride, lookup.num_lookups
        if stride > 0 and stride * num_lookups == self._num_rows:
            if any(begin % stride or end % stride for begin, end in self._rows):
                return None
            return [(begin // stride, end // stride) for begin, end in self._rows]
        if not stride and sum(self._owners) == 1:  # one rank has them all
            return [(0, num_lookups) if end > begin else (0, 0) for begin, end in self._rows]
        return None

    def _dispatch(
        self, opened: Opened, lookup: LookupArguments, num_tokens: Sequence[int], slots: Sequence[tuple[int, int]]
    ) -> LookupArguments:
        """Send each rank the codes and scores of its slots; return those that are for this rank."""
        widths = [end - begin for begin, end in slots]
        own = widths[self._exchange.rank]
        arriving, largest = [count * own for count in num_tokens], max(num_tokens) * max(widths)
        parts = [
            Part(
                pieces=[part[:, begin:end].reshape(-1).contiguous() for begin, end in slots],
                arriving=arriving,
                largest=largest,
            )
            for part in (lookup.row_ids, lookup.scores)
        ]
        shape = (sum(num_tokens), own)
        ids, scores = (part.view(shape) for part in self._exchange.send_together(opened, parts, is_beside=False).wait())
        return LookupArguments(ids, scores, lookup.code_stride)

"""Column-wise: every rank sums its columns for all tokens.

Forward: codes and scores go to all ranks in their compact form, sums of columns come back.
Backward: columns of the gradient go to their owners, shares of the score gradients come back.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mfdist.kernels.row_update import squared_sums
from mfdist.optim import RowState
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.packing import Part, columns_apart
from mfdist.sharding.routes.checks import note_ids, refusal_of
from mfdist.sharding.routes.local import LocalRoute
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.routes.token_counts import TokenCounts
from mfdist.sharding.tags import Call
from mfdist.sharding.under_way import Opened, PendingParts
from mfdist.sharding.wire import Wire
from mfdist.sharding.workload import reads_most_rows

#: Sums for one rank that are worth a lookup of their own, so that they travel while the next are made: on four H200 it
#: paid at 48 MiB, and at 24 and fewer the host's time for it was longer than what it hid.
_PART_BYTES = 32 << 20
#: [begin, end) of each rank's tokens that travel together.
_Chunk = list[tuple[int, int]]


class ColumnWise(Route):
    """The sums of each column are made at its owner, in the order they have in an unsharded table: the same bits.

    Args:
        name: the table's.
        num_rows: of the whole table.
        columns: [begin, end) of each rank's columns; empty where it has none.
        exchange: among the ranks that share the columns.
        below: what a rank does for the tokens of all of them: `LocalRoute`, or in a grid the route across hosts.
        wires: what sums travel as, and their gradients.
        can_chunk: send and sum in chunks, and before it is known how many tokens there are; only where `below` needs
            no other rank.

    Bytes sent a rank: n·K·(i + s)·(W − 1) + n·D·b·(W − 1)/W forward, n·D·b·(W − 1)/W + n·K·s·(W − 1) backward.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        columns: Sequence[tuple[int, int]],
        exchange: Exchange,
        below: Route,
        wires: tuple[torch.dtype, torch.dtype],
        *,
        can_chunk: bool,
    ) -> None:
        self._name = name
        self._num_rows = num_rows
        self._columns = tuple(columns)
        self._widths = [end - begin for begin, end in columns]
        #: The ranks that have columns, from the first column to the last.
        self._in_order = sorted((rank for rank, width in enumerate(self._widths) if width), key=columns.__getitem__)
        self._exchange = exchange
        self._below = below
        self._forward_wire, self._backward_wire = wires
        self._can_chunk = can_chunk
        self._token_counts = TokenCounts()

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        refusal = refusal_of(lookup, self._num_rows, weight, self._name)
        call = lookup.call(self._name, "column_wise")
        opened = self._exchange.open(call, [lookup.num_tokens], refusal=refusal)
        look_up = partial(self._look_up, opened, weight, is_training=is_training)
        if not self._can_chunk:
            return look_up(lookup, [counts[0] for counts in opened.wait()])
        return self._token_counts.make(opened, lookup, weight.dtype, look_up)

    def _look_up(
        self, opened: Opened, weight: Tensor, lookup: LookupArguments, num_tokens: list[int], *, is_training: bool
    ) -> tuple[Tensor, Kept]:
        """Return the sums, given how many tokens each rank has."""
        exchange, wire = self._exchange, Wire(weight.dtype, _narrower(self._forward_wire, lookup.dtype))
        chunks = self._chunks(num_tokens, lookup, wire)
        is_beside = len(chunks) > 1
        arriving = [self._gather(opened, lookup, chunk, is_beside=is_beside) for chunk in chunks]
        everyones, kept = [], Kept()
        returning: list[Callable[[], Sequence[Tensor]]] = []
        for chunk, gathered in zip(chunks, arriving, strict=True):
            shape = (sum(end - begin for begin, end in chunk), lookup.num_lookups)
            ids, scores = (part.view(shape) for part in gathered.wait())
            everyone = LookupArguments(ids, scores, lookup.code_stride)
            if not weight.shape[0]:  # or the lookup below notes them
                note_ids(everyone, self._num_rows, self._name)
            everyones.append(everyone)
            if not is_beside and self._is_worth_parts(chunk, wire):
                parts, kept = self._return_parts(opened, weight, everyone, chunk, wire, is_training=is_training)
                returning.append(partial(list, parts))
                continue
            sums, kept = self._below.forward(weight, everyone, is_training=is_training)
            returning.append(self._return(opened, wire.encode(sums), chunk, wire, is_beside=is_beside))
        # Sums are whole before they travel: rounded to what is wanted in the end, they lose nothing by it.
        out = weight.new_empty(lookup.num_tokens, sum(self._widths), dtype=_narrower(weight.dtype, lookup.dtype))
        for chunk, arrived in zip(chunks, returning, strict=True):
            begin, end = chunk[exchange.rank]
            self._place(arrived(), out[begin:end], wire)
        if len(chunks) > 1:
            kept = Kept(_in_rank_order(everyones, chunks), kept.others)
        return out, Kept(kept.tensors, (opened.call, num_tokens, kept.others))

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        opened = self._exchange.open(replace(kept.others[0], phase="gradient"))
        everyones, below = self._dispatch(opened, weight, kept, grad_output)
        row_gradient, shares = self._below.backward(weight, below, everyones, must_list=must_list)
        return row_gradient, self._combine(opened, kept, shares)

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows; see `Route.update`. A rule that takes whole rows' mean squares gets them from all ranks."""
        opened = self._exchange.open(replace(kept.others[0], phase="update"))
        everyones, below = self._dispatch(opened, weight, kept, grad_output, is_update=True)
        if state.optimizer.rule.kind != "rowwise_adagrad":
            return self._combine(opened, kept, self._below.update(weight, below, everyones, state))
        call, num_tokens, _ = kept.others
        if isinstance(self._below, LocalRoute) and reads_most_rows(sum(num_tokens) * call.num_lookups, self._num_rows):
            values, is_read, shares = self._below.marked(weight, below, everyones)
            grad_scores = self._combine(opened, kept, shares)
            counts = [self._num_rows if width else 0 for width in self._widths]
            squares = self._sum_of_owners(call, squared_sums(values), counts) / sum(self._widths)
            # A mean of squares that is not finite leaves its row as it is.
            mean_squares = squares.masked_fill(~is_read, torch.inf) if values.numel() else None
            state.update(weight, values, mean_squares=mean_squares, name=self._name)
            return grad_scores
        gradient, shares = self._below.backward(weight, below, everyones, must_list=True)
        grad_scores = self._combine(opened, kept, shares)
        squares = self._sum_of_owners(call, squared_sums(gradient.values))
        mean_squares = squares / sum(self._widths)
        state.update(weight, gradient.values, touched=gradient.row_ids, mean_squares=mean_squares, name=self._name)
        return grad_scores

    def _dispatch(
        self, opened: Opened, weight: Tensor, kept: Kept, grad_output: Tensor, *, is_update: bool = False
    ) -> tuple[Tensor, Kept]:
        """Send each owner its columns of the gradient; return this rank's columns for all tokens, and what goes below.

        On a GPU the lookups of an update are put in order while these travel.
        """
        _, num_tokens, others = kept.others
        exchange, wire, below = self._exchange, Wire(grad_output.dtype, self._backward_wire), self._below
        widths = [wire.width(each) for each in self._widths]
        own, width = num_tokens[exchange.rank], widths[exchange.rank]
        sizes = ([own * each for each in widths], [each * width for each in num_tokens], max(num_tokens) * max(widths))
        kept_below = Kept(kept.tensors, others)

        def write(rank: int, part: Tensor) -> None:
            begin, end = self._columns[rank]
            wire.write(grad_output[:, begin:end], part.view(own, widths[rank]))

        if is_update and exchange.is_hasty and isinstance(below, LocalRoute):
            local = below

            def order() -> None:
                nonlocal kept_below
                kept_below = local.ordered(weight, kept_below)

            def make(rank: int) -> Tensor:
                return wire.encode(columns_apart(grad_output, *self._columns[rank]))

            lent = exchange.lend_made(opened, make, wire.payload_dtype, *sizes, meanwhile=order)
        else:
            lent = exchange.lend(opened, write, wire.payload_dtype, *sizes)
        return wire.decode(lent.joined().view(sum(num_tokens), width)), kept_below

    def _combine(self, opened: Opened, kept: Kept, shares: Tensor) -> Tensor:
        """Send each rank this rank's shares of its score gradients; return the sum of those for this rank."""
        call, num_tokens, _ = kept.others
        exchange, own = self._exchange, num_tokens[self._exchange.rank]
        sizes = [count * call.num_lookups for count in num_tokens]
        arriving = [own * call.num_lookups] * exchange.world_size
        returned = exchange.lend_pieces(opened, shares.view(-1), sizes, arriving, max(sizes))
        total = sum_in_order(returned).view(own, call.num_lookups)
        opened.wait()
        return total

    def _sum_of_owners(self, call: Call, values: Tensor, counts: list[int] | None = None) -> Tensor:
        """Return the sum of [U] over the ranks that have columns; all have looked up the same rows.

        Args:
            call: the lookup.
            values: [U], or nothing where this rank has no columns.
            counts: how many values each rank has, where that is known.
        """
        exchange = self._exchange
        opened = exchange.open(replace(call, phase="update"), [values.numel()])
        counts = counts or [line[0] for line in opened.wait()]
        values = values[: counts[exchange.rank]]
        arriving = [count if values.numel() else 0 for count in counts]
        payload = values.repeat(sum(count > 0 for count in counts))
        sizes = [values.numel() if count else 0 for count in counts]
        shares = exchange.swap(opened, payload, sizes, arriving, max(counts))
        opened.wait()
        return sum_in_order(shares.view(-1, values.numel()).unbind()) if values.numel() else values

    def _chunks(self, num_tokens: Sequence[int], lookup: LookupArguments, wire: Wire) -> list[_Chunk]:
        bytes_a_token = lookup.num_lookups * (lookup.row_ids.element_size() + lookup.scores.element_size())
        bytes_a_token += sum(self._widths) * wire.payload_dtype.itemsize
        num_chunks = self._exchange.num_chunks(max(num_tokens) * bytes_a_token) if self._can_chunk else 1
        return [
            [(count * index // num_chunks, count * (index + 1) // num_chunks) for count in num_tokens]
            for index in range(num_chunks)
        ]

    def _gather(self, opened: Opened, lookup: LookupArguments, chunk: _Chunk, *, is_beside: bool) -> PendingParts:
        """Send a chunk of this rank's codes and scores to all ranks."""
        exchange = self._exchange
        begin, end = chunk[exchange.rank]
        arriving = [(last - first) * lookup.num_lookups for first, last in chunk]
        own = [part[begin:end].reshape(-1).contiguous() for part in (lookup.row_ids, lookup.scores)]
        parts = [Part(pieces=[part] * exchange.world_size, arriving=arriving, largest=max(arriving)) for part in own]
        return exchange.send_together(opened, parts, is_beside=is_beside)

    def _return(
        self, opened: Opened, sums: Tensor, chunk: _Chunk, wire: Wire, *, is_beside: bool
    ) -> Callable[[], Sequence[Tensor]]:
        """Send each rank the sums of its tokens in this rank's columns; return what gives those from all owners."""
        exchange = self._exchange
        counts = [last - first for first, last in chunk]
        widths = [wire.width(each) for each in self._widths]
        sizes = [count * widths[exchange.rank] for count in counts]
        arriving = [counts[exchange.rank] * width for width in widths]
        largest = max(counts) * max(widths)
        if is_beside:
            pending = exchange.send(opened, sums, sizes, arriving, largest)
            return lambda: pending.wait().split_with_sizes(arriving)
        parts = exchange.lend_pieces(opened, sums.view(-1), sizes, arriving, largest)
        return lambda: parts

    def _is_worth_parts(self, chunk: _Chunk, wire: Wire) -> bool:
        """Return whether sums of one rank's tokens are to travel while those of the next rank's are made."""
        most = max(end - begin for begin, end in chunk)
        num_bytes = most * max(map(wire.width, self._widths)) * wire.payload_dtype.itemsize
        return self._can_chunk and num_bytes >= _PART_BYTES and self._exchange.lends(num_bytes)

    def _return_parts(
        self,
        opened: Opened,
        weight: Tensor,
        everyone: LookupArguments,
        chunk: _Chunk,
        wire: Wire,
        *,
        is_training: bool,
    ) -> tuple[list[Tensor], Kept]:
        """Make and send each rank the sums of its tokens in this rank's columns; return those from all owners."""
        rank, counts = self._exchange.rank, [last - first for first, last in chunk]
        widths = [wire.width(each) for each in self._widths]
        both = (each.split_with_sizes(counts) for each in (everyone.row_ids, everyone.scores))
        parts = [LookupArguments(ids, scores, everyone.code_stride) for ids, scores in zip(*both, strict=True)]
        kept = Kept()

        def make(to: int) -> Tensor:
            nonlocal kept
            sums, kept = self._below.forward(weight, parts[to], is_training=is_training)
            return wire.encode(sums)

        sizes = [count * widths[rank] for count in counts]
        arriving = [counts[rank] * width for width in widths]
        largest = max(counts) * max(widths)
        returned = self._exchange.lend_made(opened, make, wire.payload_dtype, sizes, arriving, largest).parts
        return returned, Kept((everyone.row_ids, everyone.scores), kept.others)

    def _place(self, parts: Sequence[Tensor], out: Tensor, wire: Wire) -> None:
        """Write the columns of all owners side by side."""
        widths = [wire.width(each) for each in self._widths]
        columns = [wire.decode(parts[rank].view(out.shape[0], widths[rank]), out.dtype) for rank in self._in_order]
        torch.cat(columns, dim=1, out=out)


def _in_rank_order(everyones: Sequence[LookupArguments], chunks: Sequence[_Chunk]) -> tuple[Tensor, Tensor]:
    """Return the ids and scores of all tokens, those of one rank together, from those of one chunk together."""
    sizes = [[end - begin for begin, end in chunk] for chunk in chunks]
    ids = [one.row_ids.split_with_sizes(size) for one, size in zip(everyones, sizes, strict=True)]
    scores = [one.scores.split_with_sizes(size) for one, size in zip(everyones, sizes, strict=True)]
    in_order = [torch.cat([part[rank] for rank in range(len(chunks[0])) for part in parts]) for parts in (ids, scores)]
    return in_order[0], in_order[1]


def _narrower(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return dtype if other is None or other.itemsize >= dtype.itemsize else other


def sum_in_order(shares: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors in their order, whichever order torch's own `sum` has; in fp32 for narrower dtypes."""
    first, *others = shares
    wide = torch.promote_types(first.dtype, torch.float32)
    if not others:
        return first.clone()
    total = first.to(wide) + others[0]
    for share in others[1:]:
        total += share
    return total.to(first.dtype)

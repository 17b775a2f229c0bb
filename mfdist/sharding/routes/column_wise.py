"""Column-wise: every rank sums its columns for all tokens.

Forward: codes and scores go to all ranks in their compact form, sums of columns come back.
Backward: columns of the gradient go to their owners, shares of the score gradients come back.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mfdist.sharding.exchange import Exchange, Opened, Pending
from mfdist.sharding.routes.checks import refusal_of
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.wire import Wire

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
        can_chunk: send and sum in chunks; only where `below` needs no other rank.

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
        self._exchange = exchange
        self._below = below
        self._forward_wire, self._backward_wire = wires
        self._can_chunk = can_chunk

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        exchange, wire = self._exchange, Wire(weight.dtype, self._forward_wire)
        call = lookup.call(self._name, "column_wise")
        opened = exchange.open(
            call, [lookup.num_tokens], refusal=refusal_of(lookup, self._num_rows, weight, self._name)
        )
        num_tokens = [counts[0] for counts in opened.wait()]
        chunks = self._chunks(num_tokens, lookup, wire)
        arriving = [self._gather(opened, lookup, chunk) for chunk in chunks]
        everyones, returning, kept = [], [], Kept()
        for chunk, (ids, scores) in zip(chunks, arriving, strict=True):
            shape = (sum(end - begin for begin, end in chunk), lookup.num_lookups)
            everyone = LookupArguments(ids.wait().view(shape), scores.wait().view(shape), lookup.code_stride)
            sums, kept = self._below.forward(weight, everyone, is_training=is_training)
            everyones.append(everyone)
            returning.append(self._return(opened, wire.encode(sums), chunk, wire))
        out = weight.new_empty(lookup.num_tokens, sum(self._widths))
        for chunk, pending in zip(chunks, returning, strict=True):
            begin, end = chunk[exchange.rank]
            self._place(pending.wait(), out[begin:end], wire)
        if len(chunks) > 1:
            kept = Kept(_in_rank_order(everyones, chunks), kept.others)
        return out, Kept(kept.tensors, (replace(call, phase="gradient"), num_tokens, kept.others))

    def backward(self, weight: Tensor, kept: Kept, grad_output: Tensor) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        call, num_tokens, below = kept.others
        exchange, wire = self._exchange, Wire(weight.dtype, self._backward_wire)
        own, most = num_tokens[exchange.rank], max(num_tokens)
        opened = exchange.open(call)
        widths = [wire.width(each) for each in self._widths]
        columns = [wire.encode(grad_output[:, begin:end]).view(-1) for begin, end in self._columns]
        grads = exchange.send(
            opened,
            torch.cat(columns),
            [own * width for width in widths],
            [count * widths[exchange.rank] for count in num_tokens],
            most * max(widths),
        ).wait()
        everyones = wire.decode(grads.view(sum(num_tokens), widths[exchange.rank]))
        row_gradient, shares = self._below.backward(weight, Kept(kept.tensors, below), everyones)
        returned = exchange.send(
            opened,
            shares,
            [count * call.num_lookups for count in num_tokens],
            [own * call.num_lookups] * exchange.world_size,
            most * call.num_lookups,
        ).wait()
        opened.wait()
        return row_gradient, sum_in_order(returned.view(exchange.world_size, own, call.num_lookups))

    def _chunks(self, num_tokens: Sequence[int], lookup: LookupArguments, wire: Wire) -> list[_Chunk]:
        bytes_a_token = lookup.num_lookups * (lookup.row_ids.element_size() + lookup.scores.element_size())
        bytes_a_token += sum(self._widths) * wire.payload_dtype.itemsize
        num_chunks = self._exchange.num_chunks(max(num_tokens) * bytes_a_token) if self._can_chunk else 1
        return [
            [(count * index // num_chunks, count * (index + 1) // num_chunks) for count in num_tokens]
            for index in range(num_chunks)
        ]

    def _gather(self, opened: Opened, lookup: LookupArguments, chunk: _Chunk) -> tuple[Pending, Pending]:
        """Send a chunk of this rank's codes and scores to all ranks."""
        exchange = self._exchange
        begin, end = chunk[exchange.rank]
        arriving = [(last - first) * lookup.num_lookups for first, last in chunk]
        sizes = [arriving[exchange.rank]] * exchange.world_size
        ids, scores = (
            exchange.send(opened, part[begin:end].repeat(exchange.world_size, 1), sizes, arriving, max(arriving))
            for part in (lookup.row_ids, lookup.scores)
        )
        return ids, scores

    def _return(self, opened: Opened, sums: Tensor, chunk: _Chunk, wire: Wire) -> Pending:
        """Send each rank the sums of its tokens in this rank's columns."""
        exchange = self._exchange
        counts = [last - first for first, last in chunk]
        widths = [wire.width(each) for each in self._widths]
        sizes = [count * widths[exchange.rank] for count in counts]
        return exchange.send(
            opened, sums, sizes, [counts[exchange.rank] * width for width in widths], max(counts) * max(widths)
        )

    def _place(self, arrived: Tensor, out: Tensor, wire: Wire) -> None:
        """Write the columns of all owners, which arrived one owner after the other, side by side."""
        widths = [wire.width(each) for each in self._widths]
        parts = arrived.split_with_sizes([out.shape[0] * width for width in widths])
        for (begin, end), part, width in zip(self._columns, parts, widths, strict=True):
            out[:, begin:end] = wire.decode(part.view(out.shape[0], width))


def _in_rank_order(everyones: Sequence[LookupArguments], chunks: Sequence[_Chunk]) -> tuple[Tensor, Tensor]:
    """Return the ids and scores of all tokens, those of one rank together, from those of one chunk together."""
    sizes = [[end - begin for begin, end in chunk] for chunk in chunks]
    ids = [one.row_ids.split_with_sizes(size) for one, size in zip(everyones, sizes, strict=True)]
    scores = [one.scores.split_with_sizes(size) for one, size in zip(everyones, sizes, strict=True)]
    in_order = [torch.cat([part[rank] for rank in range(len(chunks[0])) for part in parts]) for parts in (ids, scores)]
    return in_order[0], in_order[1]


def sum_in_order(shares: Tensor) -> Tensor:
    """Return the sum over dim 0 in its order, whichever order torch's own `sum` has; in fp32 for narrower dtypes."""
    total = shares[0].to(torch.promote_types(shares.dtype, torch.float32), copy=True)
    for share in shares[1:]:
        total += share
    return total.to(shares.dtype)

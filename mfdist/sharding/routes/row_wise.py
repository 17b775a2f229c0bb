"""Row-wise: rows come to the tokens.

Forward: each id that is looked up goes to its owner, once where it is deduplicated; the row comes back, and the sums
are made here, in the order k = 0..K-1.
Backward: the gradient of a token goes once to each owner of rows it used, with its scores; the owner sums every row's
gradient over all ranks' tokens in their order, and returns the score gradients. So what travels is smaller than row
gradients wherever a token uses more rows than there are ranks, and the bits are an unsharded table's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mfdist.kernels import gather_sum
from mfdist.optim import RowState
from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.packing import Part
from mfdist.sharding.routes.checks import id_refusal, refuse, shape_refusal
from mfdist.sharding.routes.local import listed_gradient, summed_dtype
from mfdist.sharding.routes.rank_rows import RankRows
from mfdist.sharding.routes.requests import Requests, Returns, requested
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.tags import Call
from mfdist.sharding.under_way import Opened
from mfdist.sharding.wire import Wire


@dataclass(frozen=True)
class _Sizes:
    """Who sends how much in one lookup, as the ranks told each other."""

    asked: list[int]  # ids that each rank asked of this one
    tokens: list[int]  # gradients that each rank will send
    lookups: list[int]  # scores that each rank will send
    most: list[int]  # the largest of each anywhere


class RowWise(Route):
    """Sums are made from the rows as an unsharded table makes them, and so are row gradients: the same bits.

    Args:
        name: the table's.
        rows: [begin, end) of each rank's rows; empty where it has none.
        row_dim: D, of all of them.
        exchange: among the ranks that share the rows.
        deduplicate: send an id that is looked up several times once.
        wires: what rows travel as, and gradients.

    Bytes sent a rank, u being its unique ids (or n·K): u·i·(W − 1)/W and, for the others' ids, u·D·b·(W − 1)/W
    forward; p·(D·b + 4) + n·K·(4 + 2·s)·(W − 1)/W backward, p ≤ n·min(K, W − 1) being pairs of a token and an owner.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[tuple[int, int]],
        row_dim: int,
        exchange: Exchange,
        wires: tuple[torch.dtype, torch.dtype],
        *,
        deduplicate: bool,
    ) -> None:
        self._name = name
        self._rows = RankRows(rows)
        self._row_dim = row_dim
        self._exchange = exchange
        self._forward_wire, self._backward_wire = wires
        self._deduplicate = deduplicate

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        exchange, weight = self._exchange, self._as_wide(weight)
        call = lookup.call(self._name, "row_wise" if is_training else "row_wise without gradients")
        refusal, grouped = shape_refusal(lookup, self._rows.num_rows, weight, self._name), None
        if refusal is None:
            grouped = requested(lookup, self._rows, is_unique=self._deduplicate, is_training=is_training)
        if grouped is None:
            refuse(exchange, call, refusal or id_refusal(lookup, self._rows.num_rows, self._name))
        requests, returns = grouped
        opened, sizes = self._open(call, requests, returns)
        asked = exchange.swap(opened, requests.row_ids, requests.counts, sizes.asked, sizes.most[0])
        out = weight.new_empty(lookup.num_tokens, self._row_dim)
        chunks = self._chunks(sizes, Wire(weight.dtype, self._forward_wire))
        arriving = [self._fetch(opened, weight[:, begin:end], asked, requests.counts, sizes) for begin, end in chunks]
        for (begin, end), fetch in zip(chunks, arriving, strict=True):
            out[:, begin:end] = gather_sum(fetch(), requests.positions, lookup.scores, 0, self._name)
        kept = (asked, lookup.scores, *returns.tensors)
        return out, Kept(kept, (call, returns.counts, sizes))

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients, always of the rows that were looked up; see `Route.backward`."""
        dtype = summed_dtype(weight) if must_list else weight.dtype
        opened, lookups = self._arriving(weight, kept, grad_output, "gradient")
        gradient, shares = listed_gradient(self._as_wide(weight), *lookups, self._name, dtype)
        return gradient, self._returned(opened, kept, shares)

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows; see `Route.update`."""
        num_lookups = kept.tensors[1].shape[1]
        opened, lookups = self._arriving(weight, kept, grad_output, "update")
        shares = state.update_by_list(self._as_wide(weight), *lookups, num_lookups, self._name)
        return self._returned(opened, kept, shares)

    def _arriving(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, phase: str
    ) -> tuple[Opened, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Send gradients to the owners; return the call and the lookups here, as `listed_gradient` takes them."""
        call, return_counts, sizes = kept.others
        asked, scores, tokens, runs, lookups, places = kept.tensors
        exchange, wire = self._exchange, Wire(weight.dtype, self._backward_wire)
        opened = exchange.open(replace(call, phase=phase))
        width = wire.width(self._row_dim)
        token_counts, lookup_counts = return_counts
        grads = exchange.send(
            opened,
            wire.encode(grad_output[tokens]),
            [count * width for count in token_counts],
            [count * width for count in sizes.tokens],
            sizes.most[1] * width,
        )
        by_lookup = (lookup_counts, sizes.lookups, sizes.most[2])
        parts = [
            Part.cut(runs, token_counts, sizes.tokens, sizes.most[1]),
            Part.cut(places, *by_lookup),
            Part.cut(scores.reshape(-1)[lookups], *by_lookup),
        ]
        their_runs, their_places, their_scores = exchange.send_together(opened, parts).wait()
        by_rank = zip(their_places.split_with_sizes(sizes.lookups), _starts(sizes.asked), strict=True)
        row_ids = asked[torch.cat([part + start for part, start in by_rank])]
        everyones = wire.decode(grads.wait().view(sum(sizes.tokens), width))
        opened.wait()  # before anything is changed
        return opened, (row_ids, their_runs, their_scores, everyones)

    def _returned(self, opened: Opened, kept: Kept, shares: Tensor) -> Tensor:
        """Send owners' gradients of scores back; return those of this rank's [n, K]."""
        _, (_, lookup_counts), sizes = kept.others
        scores, lookups = kept.tensors[1], kept.tensors[4]
        returned = self._exchange.swap(opened, shares, sizes.lookups, lookup_counts, sizes.most[2])
        grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
        grad_scores.view(-1)[lookups] = returned
        return grad_scores

    def _as_wide(self, weight: Tensor) -> Tensor:
        """Return the held rows, as wide as everyone's where there are none."""
        return weight if weight.shape[0] else weight.new_empty(0, self._row_dim)

    def _open(self, call: Call, requests: Requests, returns: Returns) -> tuple[Opened, _Sizes]:
        """Tell each rank how much it will get, and all ranks the most that anyone will."""
        each = [requests.counts, *returns.counts]
        most = [max(counts) for counts in each]
        opened = self._exchange.open(call, [[*counts, *most] for counts in zip(*each, strict=True)])
        asked, tokens, lookups, *largest = (list(column) for column in zip(*opened.wait(), strict=True))
        sizes = _Sizes(asked, tokens, lookups, [max(column) for column in largest])
        return opened, sizes

    def _chunks(self, sizes: _Sizes, wire: Wire) -> list[tuple[int, int]]:
        """Return the columns that travel together, and are summed while the next are on their way."""
        num_bytes = sizes.most[0] * self._exchange.world_size * self._row_dim * wire.payload_dtype.itemsize
        return list(pairwise(even_cuts(self._row_dim, self._exchange.num_chunks(num_bytes))))

    def _fetch(
        self, opened: Opened, weight: Tensor, asked: Tensor, counts: Sequence[int], sizes: _Sizes
    ) -> Callable[[], Tensor]:
        """Send the rows that others asked for; return what waits for those that this rank asked for."""
        exchange, wire = self._exchange, Wire(weight.dtype, self._forward_wire)
        width = wire.width(weight.shape[1])
        pending = exchange.send(
            opened,
            wire.encode(weight.index_select(0, asked)),
            [count * width for count in sizes.asked],
            [count * width for count in counts],
            sizes.most[0] * width,
        )
        return lambda: wire.decode(pending.wait().view(sum(counts), width))


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts

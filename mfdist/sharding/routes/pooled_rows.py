"""Pooled rows: owners sum what a token uses of their rows; the partial sums are added up where the tokens are.

Forward: ids and scores of each lookup go to the row's owner, grouped by token; one partial sum a token comes back.
Backward: the gradient of a token goes once to each of those owners, which kept the rest; score gradients come back.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mfdist.optim import RowState
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.packing import Part
from mfdist.sharding.routes.checks import id_refusal, refuse, shape_refusal
from mfdist.sharding.routes.local import listed_gradient, summed_dtype
from mfdist.sharding.routes.rank_rows import RankRows
from mfdist.sharding.routes.requests import by_owner
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient
from mfdist.sharding.under_way import Opened
from mfdist.sharding.wire import Wire


class PooledRows(Route):
    """Partial sums are added in the order of the ranks: repeatable, and an unsharded table's up to rounding.

    Row gradients are summed as an unsharded table's are, to the same bits.

    Args:
        name: the table's.
        rows: [begin, end) of each rank's rows; empty where it has none.
        row_dim: D, of all of them.
        exchange: among the ranks that share the rows.
        wires: what partial sums travel as, and gradients.

    Bytes sent a rank: n·K·(i + s)·(W − 1)/W + p·(D·b + 4) forward, p·D·b + n·K·s·(W − 1)/W backward,
    p ≤ n·min(K, W − 1) being pairs of a token and an owner.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[tuple[int, int]],
        row_dim: int,
        exchange: Exchange,
        wires: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self._name = name
        self._rows = RankRows(rows)
        self._row_dim = row_dim
        self._exchange = exchange
        self._forward_wire, self._backward_wire = wires

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        exchange, wire = self._exchange, Wire(weight.dtype, self._forward_wire)
        call = lookup.call(self._name, "pooled rows")
        refusal = shape_refusal(lookup, self._rows.num_rows, weight, self._name)
        asked = None if refusal else by_owner(lookup, self._rows)
        if asked is None:
            refuse(exchange, call, refusal or id_refusal(lookup, self._rows.num_rows, self._name))
        token_counts, lookup_counts = asked.counts
        most = [max(counts) for counts in asked.counts]
        opened = exchange.open(call, [[*counts, *most] for counts in zip(*asked.counts, strict=True)])
        their_tokens, their_lookups, *largest = (list(column) for column in zip(*opened.wait(), strict=True))
        most = [max(column) for column in largest]
        by_lookup, by_token = (lookup_counts, their_lookups, most[1]), (token_counts, their_tokens, most[0])
        parts = [
            Part.cut(asked.runs, *by_token),
            Part.cut(asked.row_ids, *by_lookup),
            Part.cut(lookup.scores.reshape(-1)[asked.lookups], *by_lookup),
        ]
        runs, row_ids, scores = exchange.send_together(opened, parts, is_beside=False).wait()
        width = wire.width(self._row_dim)
        returned = exchange.swap(
            opened,
            wire.encode(_ragged_sums(self._as_wide(weight), row_ids, runs, scores)),
            [count * width for count in their_tokens],
            [count * width for count in token_counts],
            most[0] * width,
        )
        out = weight.new_zeros(lookup.num_tokens, self._row_dim, dtype=summed_dtype(weight))
        shares = wire.decode(returned.view(sum(token_counts), width)).split_with_sizes(token_counts)
        for tokens, share in zip(asked.tokens.split_with_sizes(token_counts), shares, strict=True):
            if tokens.numel() == lookup.num_tokens:
                out += share
            else:  # a token is there once
                out.index_add_(0, tokens, share.to(out.dtype))
        kept = (row_ids, scores, runs, lookup.scores, asked.tokens, asked.lookups)
        return out.to(weight.dtype), Kept(kept, (call, asked.counts, (their_tokens, their_lookups), most))

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients, always of the rows that were looked up; see `Route.backward`."""
        dtype = summed_dtype(weight) if must_list else weight.dtype
        row_ids, scores, runs, *_ = kept.tensors
        opened, grads = self._arriving(weight, kept, grad_output, "gradient")
        gradient, shares = listed_gradient(self._as_wide(weight), row_ids, runs, scores, grads, self._name, dtype)
        return gradient, self._returned(opened, kept, shares)

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows; see `Route.update`."""
        row_ids, scores, runs, own_scores, *_ = kept.tensors
        opened, grads = self._arriving(weight, kept, grad_output, "update")
        shares = state.update_by_list(
            self._as_wide(weight), row_ids, runs, scores, grads, own_scores.shape[1], self._name
        )
        return self._returned(opened, kept, shares)

    def _arriving(self, weight: Tensor, kept: Kept, grad_output: Tensor, phase: str) -> tuple[Opened, Tensor]:
        """Send gradients to the owners; return the call, and those of the tokens that looked up rows here."""
        call, (token_counts, _), (their_tokens, _), most = kept.others
        runs, tokens = kept.tensors[2], kept.tensors[4]
        wire = Wire(weight.dtype, self._backward_wire)
        width = wire.width(self._row_dim)
        opened = self._exchange.open(replace(call, phase=phase))
        arriving = self._exchange.swap(
            opened,
            wire.encode(grad_output[tokens]),
            [count * width for count in token_counts],
            [count * width for count in their_tokens],
            most[0] * width,
        )
        opened.wait()  # before anything is changed
        return opened, wire.decode(arriving.view(runs.numel(), width))

    def _returned(self, opened: Opened, kept: Kept, shares: Tensor) -> Tensor:
        """Send owners' gradients of scores back; return those of this rank's [n, K]."""
        _, (_, lookup_counts), (_, their_lookups), most = kept.others
        scores, lookups = kept.tensors[3], kept.tensors[5]
        returned = self._exchange.swap(opened, shares, their_lookups, lookup_counts, most[1])
        grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
        grad_scores.view(-1)[lookups] = returned
        return grad_scores

    def _as_wide(self, weight: Tensor) -> Tensor:
        """Return the held rows, as wide as everyone's where there are none."""
        return weight if weight.shape[0] else weight.new_empty(0, self._row_dim)


def _ragged_sums(weight: Tensor, row_ids: Tensor, runs: Tensor, scores: Tensor) -> Tensor:
    """Return one sum of rows [P, D] for each run of lookups."""
    if not runs.numel() or not weight.shape[1]:  # torch's sums of rows without columns are an error
        return weight.new_empty(runs.numel(), weight.shape[1])
    starts = runs.cumsum(0, dtype=row_ids.dtype) - runs
    return nn.functional.embedding_bag(row_ids, weight, starts, mode="sum", per_sample_weights=scores.to(weight.dtype))

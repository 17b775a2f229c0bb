"""The route that ends here: all rows, or all that are asked for, lie on this rank."""

from dataclasses import replace

import torch
from torch import Tensor

from mfdist.kernels import gather_sum, marked_row_gradient, order_lookups, ragged_gradient, row_gradient
from mfdist.optim import RowState
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient


def summed_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which gradients of rows are summed."""
    return torch.promote_types(weight.dtype, torch.float32)


def listed_gradient(
    weight: Tensor, row_ids: Tensor, runs: Tensor, scores: Tensor, grads: Tensor, name: str, dtype: torch.dtype
) -> tuple[RowGradient, Tensor]:
    """Return the gradient of the rows that listed lookups read, in `dtype`, and that of their scores [M].

    Args:
        weight: [R, d].
        row_ids, scores: [M], token by token.
        runs: [T], how many lookups each token has.
        grads: [T, d], of the tokens' sums.
        name: the table's.
        dtype: of the gradient.
    """
    tokens = torch.repeat_interleave(runs, output_size=row_ids.numel())
    rows, values, shares = ragged_gradient(weight, row_ids, tokens, scores, grads, name, dtype=dtype)
    return RowGradient(values, rows), shares


class LocalRoute(Route):
    """Sums and gradients by the kernels, without a word to anyone.

    Args:
        name: the table's, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        if not weight.shape[0]:  # of a rank without a part of the table
            return weight.new_zeros(lookup.num_tokens, weight.shape[1]), self._keep(lookup)
        return gather_sum(weight, lookup.row_ids, lookup.scores, lookup.code_stride, self._name), self._keep(lookup)

    def backward(
        self, weight: Tensor, kept: Kept, grad_output: Tensor, *, must_list: bool = False
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        row_ids, scores = kept.tensors
        if must_list:
            return self._listed(weight, row_ids, scores, grad_output, kept.others)
        if not weight.numel():
            return RowGradient(torch.zeros_like(weight)), torch.zeros_like(scores)
        rows, grad_scores = row_gradient(weight, row_ids, scores, grad_output, kept.others, self._name)
        return RowGradient(rows), grad_scores

    def ordered(self, weight: Tensor, kept: Kept) -> Kept:
        """Return what a lookup has kept, with what can be made of it before its gradient is there.

        It serves one `update` or `marked`.
        """
        row_ids, scores = kept.tensors
        if not weight.numel():
            return kept
        return replace(kept, ordered=order_lookups(weight, row_ids, scores, kept.others, self._name))

    def marked(self, weight: Tensor, kept: Kept, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of all rows held [R, d], which were looked up [R], and the scores' gradients [n, K].

        Gradients are in fp32, or the table's dtype where that is wider. Nothing is listed, and no GPU waited for.
        """
        row_ids, scores = kept.tensors
        if not weight.numel():
            is_read = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            return weight.new_zeros(weight.shape, dtype=summed_dtype(weight)), is_read, torch.zeros_like(scores)
        return marked_row_gradient(weight, row_ids, scores, grad_output, kept.others, self._name, kept.ordered)

    def update(self, weight: Tensor, kept: Kept, grad_output: Tensor, state: RowState) -> Tensor:
        """Train the rows; see `Route.update`."""
        row_ids, scores = kept.tensors
        return state.update_by_lookup(weight, row_ids, scores, grad_output, kept.others, self._name, kept.ordered)

    def _listed(
        self, weight: Tensor, row_ids: Tensor, scores: Tensor, grad_output: Tensor, code_stride: int
    ) -> tuple[RowGradient, Tensor]:
        if not weight.numel():  # all of its rows have no columns here, or there are none
            nothing = weight.new_empty(0, weight.shape[1])
            return RowGradient(nothing, row_ids.new_empty(0, dtype=torch.int64)), torch.zeros_like(scores)
        num_tokens, num_lookups = row_ids.shape
        ids = row_ids.long() + code_stride * torch.arange(num_lookups, device=row_ids.device)
        tokens = torch.arange(num_tokens, device=row_ids.device).repeat_interleave(num_lookups)
        listed = (ids.reshape(-1), tokens, scores.reshape(-1), grad_output)
        rows, values, grad_scores = ragged_gradient(weight, *listed, self._name, dtype=summed_dtype(weight))
        return RowGradient(values, rows), grad_scores.view(num_tokens, num_lookups)

    def _keep(self, lookup: LookupArguments) -> Kept:
        return Kept((lookup.row_ids, lookup.scores), lookup.code_stride)

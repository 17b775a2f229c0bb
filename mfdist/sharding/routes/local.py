"""The route that ends here: all rows, or all that are asked for, lie on this rank."""

import torch
from torch import Tensor

from mfdist.kernels import gather_sum, row_gradient
from mfdist.sharding.routes.route import Kept, LookupArguments, Route, RowGradient


class LocalRoute(Route):
    """Sums and gradients by the kernels, without a word to anyone.

    Args:
        name: the table's, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def forward(self, weight: Tensor, lookup: LookupArguments, *, is_training: bool) -> tuple[Tensor, Kept]:
        """Return the sums; see `Route.forward`."""
        if not weight.numel():  # a rank without rows or columns
            return weight.new_zeros(lookup.num_tokens, weight.shape[1]), self._keep(lookup)
        return gather_sum(weight, lookup.row_ids, lookup.scores, lookup.code_stride, self._name), self._keep(lookup)

    def backward(self, weight: Tensor, kept: Kept, grad_output: Tensor) -> tuple[RowGradient, Tensor]:
        """Return the gradients; see `Route.backward`."""
        row_ids, scores = kept.tensors
        if not weight.numel():
            return RowGradient(torch.zeros_like(weight)), torch.zeros_like(scores)
        rows, grad_scores = row_gradient(weight, row_ids, scores, grad_output, kept.others, self._name)
        return RowGradient(rows), grad_scores

    def _keep(self, lookup: LookupArguments) -> Kept:
        return Kept((lookup.row_ids, lookup.scores), lookup.code_stride)

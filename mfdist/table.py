"""The one interface behind every memory layer: a table of rows that can be looked up.

Call order: any number of lookups (`table(row_ids, scores)`), each followed or not by a backward. A lookup changes
nothing and may be repeated. Local, sharded and remote tables are interchangeable under a `MemoryLayer`.

Shape letters: N tokens, K lookups a token, R rows, D row width.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mfdist.spec import TableSpec


class Table(nn.Module, ABC):
    """A logical array of R rows of width D whose forward is the weighted lookup."""

    def __init__(self, spec: TableSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, row_ids: Tensor, scores: Tensor, *, code_stride: int = 0) -> Tensor:
        """Return the score-weighted sum of K rows for each token: out[n] = Σ_k scores[n, k] · row[id[n, k]].

        Args:
            row_ids: [N, K], an integer dtype; N and K may be 0; repeated ids add up. With `code_stride` S > 0 they are
                codes in [0, S) and the row of slot k is k·S + code, so that codes travel in their compact form.
            scores: [N, K], fp32.
            code_stride: rows a slot owns, or 0 where `row_ids` are row ids in [0, R).

        Returns:
            [N, D] in the table's dtype, or in autocast's where that is on; summed in fp32 in the order k = 0..K-1.
            Differentiable in the scores and in the rows.

        Raises:
            RowIdError: an id lies outside the table; nothing was read. On a GPU it may be raised by a later call.

        Called on: any thread of the process that holds the table; concurrent lookups are safe.
        """

    def extra_repr(self) -> str:
        """Return the spec as shown by `print(model)`."""
        spec = self.spec
        dtype = str(spec.dtype).removeprefix("torch.")
        return f'"{spec.name}", num_rows={spec.num_rows}, row_dim={spec.row_dim}, dtype={dtype}'

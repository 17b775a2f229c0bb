"""Which rank has which rows, as tensors where they are needed."""

from collections.abc import Sequence

import torch
from torch import Tensor


class RankRows:
    """The ranks' rows, numbered rank by rank, so that those of rank 0 come first; mostly that is the same number.

    Tensors are made once for each device: making one from Python's numbers waits for a GPU.

    Args:
        rows: [begin, end) of each rank's rows, all of a table; empty where it has none.
    """

    def __init__(self, rows: Sequence[tuple[int, int]]) -> None:
        self.world_size = len(rows)
        self.num_rows = max(end for _, end in rows)
        starts = [0]
        for begin, end in rows:
            starts.append(starts[-1] + end - begin)
        parts = sorted((begin, rank) for rank, (begin, end) in enumerate(rows) if end > begin)
        self._numbers = (starts, [begin for begin, _ in parts[1:]], [starts[rank] - begin for begin, rank in parts])
        self._tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def starts(self, device: torch.device) -> Tensor:
        """Return the first number of each rank's rows and their total, [W + 1] int64."""
        return self._on(device)[0]

    def numbered(self, ids: Tensor) -> Tensor:
        """Return row ids, int64, by their numbers."""
        if not any(self._numbers[2]):
            return ids
        _, begins, shifts = self._on(ids.device)
        return ids + shifts[torch.bucketize(ids, begins, right=True)]

    def owners(self, numbers: Tensor) -> Tensor:
        """Return the ranks, int64, that have the rows with these numbers."""
        return torch.bucketize(numbers, self.starts(numbers.device)[1:], right=True)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tensors:
            starts, begins, shifts = (torch.tensor(part, dtype=torch.int64, device=device) for part in self._numbers)
            self._tensors[device] = (starts, begins, shifts)
        return self._tensors[device]

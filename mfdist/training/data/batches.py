"""Which tokens make up the batch of a step: a pure function of seed and step, whatever the number of ranks.

Shapes: B sequences a step over all ranks, L = seq_len tokens a sequence.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdist.errors import ConfigError, DataError
from mfdist.training.data.tokenizer import Tokens

#: Target of positions that are not scored, as in torch.nn.functional.cross_entropy.
NO_TARGET = -100

_ROUNDS = 6  # with 4, neighbours in the text stay neighbours a third more often than chance has it


class BatchOrder:
    """The order in which training sequences are visited.

    Sequence i is the tokens [i·L, i·L + L]: L inputs and, one further on, L targets, so that every token but the first
    is a target once an epoch (a rest of less than L is left out). Every epoch visits each sequence once, in its own
    order; a batch may lie across the border of two epochs. Nothing is stored: the order follows from the arguments.
    """

    def __init__(
        self, num_tokens: int, *, seq_len: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Describe the order.

        Args:
            num_tokens: length of the training text.
            seq_len: inputs a sequence, at least 1.
            batch_size: sequences a step over all ranks; a multiple of world_size.
            seed: decides the order.
            rank: which part of each batch is ours; the ranks' parts, one after the other, are the batch.
            world_size: number of ranks.

        Raises:
            DataError: the text is too short for one batch of different sequences.
            ConfigError: the batch does not divide among the ranks.
        """
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ConfigError(
                f"training.batch_size must be a multiple of the number of ranks, and rank one of them;"
                f" got batch_size={batch_size}, world_size={world_size}, rank={rank}; change training.batch_size"
            )
        self.num_sequences = max(num_tokens - 1, 0) // seq_len
        if self.num_sequences < batch_size:
            raise DataError(
                f"the training text must fill one batch, {batch_size} x {seq_len} + 1 ="
                f" {batch_size * seq_len + 1} tokens; got {num_tokens};"
                f" give more text, or lower training.batch_size or training.seq_len"
            )
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._first = rank * (batch_size // world_size)
        self._count = batch_size // world_size

    def epoch_of(self, step: int) -> int:
        """Return how many times the whole text was visited before the batch of `step`, which counts from 0."""
        return step * self.batch_size // self.num_sequences

    def sequence_ids(self, step: int) -> NDArray[np.int64]:
        """Return [B / world_size] ids of the sequences in this rank's part of the batch of `step` (from 0)."""
        start = step * self.batch_size + self._first
        epoch, index = divmod(start, self.num_sequences)
        in_first = min(self._count, self.num_sequences - index)
        parts = [self._visited(epoch, index, in_first)]
        if in_first < self._count:  # a batch is no longer than an epoch, so it meets two at most
            parts.append(self._visited(epoch + 1, 0, self._count - in_first))
        return np.concatenate(parts)

    def _visited(self, epoch: int, index: int, count: int) -> NDArray[np.int64]:
        return _permuted(np.arange(index, index + count, dtype=np.int64), self.num_sequences, (self.seed, epoch))


class TokenBatches:
    """The batches themselves."""

    def __init__(self, tokens: Tokens, order: BatchOrder) -> None:
        """Read from `tokens`, a one-dimensional array that may be memory-mapped, in the given order."""
        self._tokens = tokens
        self.order = order

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's inputs and targets of `step` (from 0): int64 [B / world_size, L], on the CPU, fresh."""
        starts = self.order.sequence_ids(step) * self.order.seq_len
        rows = np.stack([self._tokens[start : start + self.order.seq_len + 1] for start in starts]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def validation_batches(
    tokens: Tokens, seq_len: int, batch_size: int, *, max_sequences: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the validation text in order, every token but the first being a target exactly once.

    Args:
        tokens: one-dimensional, at least 2 tokens.
        seq_len: tokens a sequence.
        batch_size: sequences a batch; the last batch may hold fewer.
        max_sequences: where the text holds more sequences, only this many full ones, spread evenly over it.

    Yields:
        inputs, targets: int64 [<= batch_size, seq_len]; a last sequence that is not full is padded, its targets with
        NO_TARGET.

    Raises:
        DataError: there are fewer than 2 tokens.
    """
    num_targets = len(tokens) - 1
    if num_targets < 1:
        raise DataError(f"the validation text must have at least 2 tokens; got {len(tokens)}; give more text")
    num_sequences = -(-num_targets // seq_len)
    ids: range | list[int] = range(num_sequences)
    if max_sequences is not None and max_sequences < num_sequences:
        num_full = num_targets // seq_len
        ids = [index * num_full // max_sequences for index in range(max_sequences)]
    for first in range(0, len(ids), batch_size):
        batch = ids[first : first + batch_size]
        inputs = torch.zeros((len(batch), seq_len), dtype=torch.int64)
        targets = torch.full((len(batch), seq_len), NO_TARGET, dtype=torch.int64)
        for row, index in enumerate(batch):
            span = torch.from_numpy(tokens[index * seq_len : (index + 1) * seq_len + 1].astype(np.int64))
            inputs[row, : len(span) - 1] = span[:-1]
            targets[row, : len(span) - 1] = span[1:]
        yield inputs, targets


def _permuted(indices: NDArray[np.int64], size: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """Map each index in [0, size) to its image under a pseudo-random permutation that `key` chooses.

    A Feistel network permutes [0, 4^h), the least such range that holds `size`; images outside [0, size) are mapped
    again until they fall inside, which keeps it a permutation.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    low_mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=np.bool_)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & low_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right + round_key) & low_mask)
        values[outside] = (left << shift) | right
        outside = values >= size
    return values.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit values (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

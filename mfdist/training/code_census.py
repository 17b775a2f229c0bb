"""Counting codes: which rows of each memory layer the tokens of a validation address, and with what scores.

Codes are seen before the lookup, so it makes no difference where the rows lie: in this process, on other ranks or on
servers. Shape letters: N tokens, K tables of a layer, S = 2^bits rows of each.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mfdist.layers import MemoryLayer
from mfdist.training.world import World

Counts = npt.NDArray[np.int64]

#: Tokens that a rank counts at most each time: enough to tell dead rows from unlucky ones up to 12 bits.
MAX_TOKENS = 16384
#: Rows of a layer that are counted at most, 4 MiB of counters; of a larger layer, some tables, at least one.
MAX_ROWS = 1 << 20

#: Scores are counted in buckets of equal ratio, from 2^-24 to 2^8.
BUCKETS_AN_OCTAVE = 16
LOWEST_OCTAVE, HIGHEST_OCTAVE = -24, 8
NUM_BUCKETS = BUCKETS_AN_OCTAVE * (HIGHEST_OCTAVE - LOWEST_OCTAVE)


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """What was counted of one layer.

    Args:
        name: of its table.
        num_tables: K.
        bits: of a code.
        tables: the numbers of those of the K tables whose codes were counted.
        hits: [len(tables), S], how often each row was addressed.
        scores: [NUM_BUCKETS], how often each score came, of all K tables.
    """

    name: str
    num_tables: int
    bits: int
    tables: tuple[int, ...]
    hits: Counts
    scores: Counts

    @property
    def num_tokens(self) -> int:
        """Return how many tokens were counted; each addresses one row of each table."""
        return int(self.hits[0].sum())


class CodeCensus:
    """Counts the codes of a model's memory layers on all ranks.

    Call order: `batch` before each forward inside `watching`, then `total` once.

    Args:
        model: its memory layers, which must have called `hash` on the tokens in the order of `batch`.
        num_tokens: how many this rank will see; more than MAX_TOKENS are thinned out evenly.
    """

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        layers = [module for module in model.modules() if isinstance(module, MemoryLayer)]
        self._layers = {layer.table.spec.name: _LayerCensus(layer) for layer in layers}
        self._every = max(1, -(-num_tokens // MAX_TOKENS))
        self._num_sequences = 0
        self.elapsed_s = 0.0  # spent counting, where the device does not go on by itself
        self._chosen: tuple[slice, Tensor | None] = (slice(0), None)

    def batch(self, is_real: Tensor) -> None:
        """Take the next batch: is_real [B, T] says which of its tokens are not padding."""
        first = -self._num_sequences % self._every
        self._num_sequences += len(is_real)
        sequences = slice(first, None, self._every)
        chosen = is_real[sequences]
        self._chosen = sequences, None if chosen.all() else chosen

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in every forward of the model while this lasts."""
        handles = [layer.module.register_forward_pre_hook(partial(self._see, layer)) for layer in self._layers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def total(self, world: World) -> list[LayerCounts]:
        """Return what all ranks have counted, by layer in the model's order. Called on all ranks."""
        layers = list(self._layers.items())
        if not layers:
            return []
        counted = torch.cat([part.flatten() for _, layer in layers for part in (layer.hits, layer.scores)])
        totals = world.total(counted).cpu().numpy().astype(np.int64)
        found, start = [], 0
        for name, layer in layers:
            hits = totals[start : start + layer.hits.numel()].reshape(layer.hits.shape)
            start += layer.hits.numel()
            scores = totals[start : start + NUM_BUCKETS]
            start += NUM_BUCKETS
            found.append(
                LayerCounts(
                    name=name,
                    num_tables=layer.module.hash.num_tables,
                    bits=layer.module.hash.bits,
                    tables=layer.tables,
                    hits=hits,
                    scores=scores,
                )
            )
        return found

    def _see(self, layer: "_LayerCensus", module: nn.Module, inputs: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        sequences, is_real = self._chosen
        x: Tensor = inputs[0].detach()[sequences]
        if x.numel():
            layer.add(x.flatten(0, -2) if is_real is None else x[is_real.to(x.device)])
        self.elapsed_s += time.perf_counter() - start


class _LayerCensus:
    """The counters of one layer, on its device."""

    def __init__(self, module: MemoryLayer) -> None:
        self.module = module
        addressing, device = module.hash, module.table.get_parameter("weight").device
        step = -(-addressing.num_tables // max(1, MAX_ROWS // addressing.code_stride))
        self.tables = tuple(range(0, addressing.num_tables, step))
        self.hits = torch.zeros(len(self.tables), addressing.code_stride, dtype=torch.int32, device=device)
        self.scores = torch.zeros(NUM_BUCKETS, dtype=torch.int32, device=device)

    def add(self, x: Tensor) -> None:
        """Count activations [N, d]."""
        codes, scores = self.module.hash(x)
        step = self.tables[1] - self.tables[0] if len(self.tables) > 1 else self.module.hash.num_tables
        rows = codes[:, ::step].to(torch.int64)
        rows += torch.arange(len(self.tables), device=rows.device) * self.module.hash.code_stride
        hits = torch.bincount(rows.flatten(), minlength=self.hits.numel())
        self.hits += hits.view(self.hits.shape).to(self.hits.device)
        # NaN counts as nothing at all, infinity as the largest: a step that is not finite is another's to tell.
        exponents = scores.nan_to_num(0.0).clamp(2.0**LOWEST_OCTAVE, 2.0**HIGHEST_OCTAVE).log2()
        places = ((exponents - LOWEST_OCTAVE) * BUCKETS_AN_OCTAVE).ceil()
        buckets = (places.to(torch.int64) - 1).clamp_min(0)  # an edge, such as 1, belongs to what is below
        self.scores += torch.bincount(buckets.flatten(), minlength=NUM_BUCKETS).to(self.scores.device)

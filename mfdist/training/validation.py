"""Validation while a run trains: the score on held-out text, and how the tables are used by it."""

import time
from collections.abc import Callable
from typing import Any

from mfdist.config import RunConfig
from mfdist.models import Transformer
from mfdist.training.code_census import CodeCensus
from mfdist.training.collapse import collapse_message
from mfdist.training.data.token_store import TokenStore
from mfdist.training.evaluation import evaluate
from mfdist.training.events import Diagnosed, Observer, Warned
from mfdist.training.layer_use import detail_of, use_of
from mfdist.training.row_movement import RowMovement
from mfdist.training.world import World


class Validation:
    """Scores the model of a run.

    Args:
        model: with its tables where they are trained.
        store: the run's text.
        config: the run's.
        world: the ranks.
        can_redraw: whether the tables' first rows are those that this kind of device draws from their seeds.
        keep: given the details of the tables' use, on rank 0; see `RunDirectory.write_table_use`.
    """

    def __init__(
        self,
        model: Transformer,
        store: TokenStore,
        config: RunConfig,
        world: World,
        *,
        can_redraw: bool,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._model, self._store, self._config, self._world, self._keep = model, store, config, world, keep
        self._movement = RowMovement(model) if can_redraw else None
        self._warned: set[str] = set()

    def __call__(self, step: int, max_sequences: int | None, tell: Observer) -> None:
        """Score the model after `step` steps on so many sequences, or on all, and tell of it. Called on all ranks."""
        training, world = self._config.training, self._world
        num_sequences = -(-(len(self._store.validation) - 1) // training.seq_len)
        num_sequences = min(num_sequences, max_sequences or num_sequences)
        census = CodeCensus(self._model, num_sequences * training.seq_len // world.world_size)
        tell(
            evaluate(
                self._model,
                self._store,
                step=step,
                seq_len=training.seq_len,
                precision=training.precision,
                max_sequences=max_sequences,
                world=world,
                census=census,
            )
        )
        self._diagnose(step, census, tell)

    def _diagnose(self, step: int, census: CodeCensus, tell: Observer) -> None:
        start = time.perf_counter()
        counted = [counts for counts in census.total(self._world) if counts.num_tokens]
        moved = {} if self._movement is None else self._movement.measure()
        if not counted or not self._world.is_first:
            return
        layers = tuple(use_of(counts, moved.get(counts.name)) for counts in counted)
        details = [detail_of(counts, moved.get(counts.name)) for counts in counted]
        num_tokens = counted[0].num_tokens
        self._keep({"version": 1, "step": step, "num_tokens": num_tokens, "layers": details})
        elapsed_s = time.perf_counter() - start + census.elapsed_s
        tell(Diagnosed(step=step, num_tokens=num_tokens, layers=layers, elapsed_s=elapsed_s))
        collapsed = [use for use in layers if use.name not in self._warned and use.has_collapsed]
        if collapsed:
            self._warned |= {use.name for use in collapsed}
            tell(Warned(message=collapse_message(collapsed, step)))

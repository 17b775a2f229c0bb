"""What a checkpoint holds: tables with their row optimiser's state, every other tensor, and plain JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from mfdist.errors import ConfigError

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"


@dataclass(frozen=True, kw_only=True)
class TableState:
    """One table and its row optimiser's state.

    Raises:
        ConfigError: the weight is not [num_rows, row_dim], or a state has another number of rows.
    """

    weight: Tensor  # [num_rows, row_dim]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)  # each [num_rows, …]

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ConfigError(
                f"a table must be [num_rows, row_dim]; got shape {list(self.weight.shape)}; "
                "save tensors of other shapes under `dense`."
            )
        for name, tensor in self.optimizer.items():
            if name == "weight":
                raise ConfigError("an optimiser state must not be named 'weight', the table's own array; rename it.")
            if tensor.ndim == 0 or tensor.shape[0] != self.weight.shape[0]:
                raise ConfigError(
                    f"optimiser state {name!r} must have num_rows={self.weight.shape[0]} rows; "
                    f"got shape {list(tensor.shape)}; save what is not per row under `dense`."
                )


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Everything a run needs to go on from a step.

    Raises:
        ConfigError: the step is negative, or the attributes are not what JSON gives back unchanged.
    """

    step: int
    tables: Mapping[str, TableState]  # "blocks.0.qkv" → …
    dense: Mapping[str, Tensor]  # any dtype and shape; "/" in a name makes groups: "model/head.weight"
    attributes: Mapping[str, JSON]

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ConfigError(f"a checkpoint's step must be 0 or more; got {self.step}; count finished steps from 0.")
        # A checkpoint is exact: NaN, tuples and integer keys would come back as something else or as invalid JSON.
        try:
            text = json.dumps(dict(self.attributes), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"checkpoint attributes must be plain JSON; got one that is not ({error}); convert it first."
            ) from error
        if json.loads(text) != dict(self.attributes):
            raise ConfigError(
                "checkpoint attributes must survive JSON unchanged; got tuples or keys that are not strings; "
                "use lists and string keys."
            )

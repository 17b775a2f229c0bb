"""A training run's state as a checkpoint holds it, and back.

Every table is one array and one more a state of its optimiser, under the table's name; every other tensor goes under
`model/NAME` and `optimizer/NAME/MOMENT`; the rest (configuration, data position, versions) is JSON.
"""

import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mfdist.checkpoint.state import CheckpointState, TableShard, TableState
from mfdist.config import RunConfig, parse_config
from mfdist.errors import CheckpointError, ConsistencyError
from mfdist.models import Transformer
from mfdist.spec import Region
from mfdist.table import Table
from mfdist.training.optimizer import RunOptimizer, table_parameter_names
from mfdist.training.run import is_changeable

_MOMENTS = ("exp_avg", "exp_avg_sq")
_GENERATOR = "rng/cpu"


def capture(
    model: Transformer, optimizer: RunOptimizer, *, step: int, config: RunConfig, data_fingerprint: str
) -> CheckpointState:
    """Return the state after `step` finished steps, of tables the parts that this rank holds.

    Its tensors alias the live ones, so save before training on.
    """
    table_names = table_parameter_names(model)
    held = {table.spec.name: table for table in _tables(model)}
    moments = optimizer.state()
    tables: dict[str, TableState] = {}
    shards: dict[str, list[TableShard]] = {}
    dense: dict[str, Tensor] = {_GENERATOR: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        kept = {moment: value for moment, value in moments.get(name, {}).items() if moment != "step"}
        if name in table_names:
            table = held[table_names[name]]
            spec, region = table.spec, table.region
            if region == spec.region:
                tables[spec.name] = TableState(weight=parameter.detach(), optimizer=kept)
            elif not region.is_empty:
                shard = TableShard(
                    num_rows=spec.num_rows,
                    row_dim=spec.row_dim,
                    region=region,
                    weight=parameter.detach(),
                    optimizer=kept,
                )
                shards[spec.name] = [shard]
        else:
            dense[f"model/{name}"] = parameter.detach()
            dense.update({f"optimizer/{name}/{moment}": value for moment, value in kept.items()})
    return CheckpointState(
        step=step,
        tables=tables,
        shards=shards,
        dense=dense,
        attributes={
            "config": config.to_toml(),
            "data": {"fingerprint": data_fingerprint},  # batches follow from seed and step alone
            "optimizer": {"name": "AdamW", "tables": config.optimizer.tables.rule},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )


def config_of(state: CheckpointState) -> RunConfig:
    """Return the configuration the checkpoint was written under."""
    return parse_config(_text(state, "config"), origin=f"checkpoint of step {state.step}")


def check_data(state: CheckpointState, fingerprint: str) -> None:
    """Raise ConsistencyError where tokens of this fingerprint are not those the checkpoint was trained on."""
    trained_on = _text(state, "data", "fingerprint")
    if fingerprint != trained_on:
        raise ConsistencyError(
            f"a run must see the text it began with; step {state.step} was trained on tokens {trained_on[:12]} and the "
            f"source now gives {fingerprint[:12]}: its files or the tokenizer changed; restore them or start a new one"
        )


def check_config(state: CheckpointState, config: RunConfig) -> None:
    """Raise ConsistencyError where a configuration would make another run of the one the checkpoint belongs to."""
    trained_under, found = flat(config_of(state).model_dump()), flat(config.model_dump())
    for key, value in trained_under.items():
        if found.get(key) != value and not is_changeable(key):
            raise ConsistencyError(
                f"a resumed run keeps its model, data, seed and batches; step {state.step} was trained with "
                f"{key}={value!r} and the run's config.toml now says {found.get(key)!r}; put it back "
                "or start a new one"
            )


def held_regions(model: Transformer) -> dict[str, list[Region]]:
    """Return the region of each table that this rank holds, without those of which it holds nothing."""
    return {table.spec.name: [table.region] for table in _tables(model) if not table.region.is_empty}


def load_model(model: Transformer, state: CheckpointState) -> None:
    """Copy a checkpoint's weights into the model, in place, on whatever device it lies.

    Raises:
        CheckpointError: an array is missing, left over, or of another shape; the message names it.
    """
    table_names = table_parameter_names(model)
    wanted = dict(model.named_parameters())
    found = {
        name: _weight(state, name, table_names) if parameter.numel() else parameter.detach()
        for name, parameter in wanted.items()
    }
    missing = [name for name, tensor in found.items() if tensor is None]
    left_over = {f"model/{name}" for name in wanted}.symmetric_difference(
        name for name in state.dense if name.startswith("model/")
    ) - {f"model/{name}" for name in table_names}
    if missing or left_over:
        raise CheckpointError(
            f"a checkpoint must hold the model's parameters; step {state.step} lacks "
            f"{_some(missing)} and holds {_some(sorted(left_over))} besides"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = found[name]
            assert value is not None
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{name} must have shape {tuple(parameter.shape)}; got {tuple(value.shape)} in step {state.step}"
                )
            parameter.copy_(value)


def load_training(model: Transformer, optimizer: RunOptimizer, state: CheckpointState) -> None:
    """Take over weights, optimiser state and random generator, so that training goes on as if never stopped.

    Raises:
        CheckpointError: as `load_model`; or the step holds weights alone, and nothing was changed.
    """
    if _GENERATOR not in state.dense:
        raise CheckpointError(
            f"step {state.step} holds weights alone and cannot be trained on; delete it to go on from the step before, "
            "or import an export made without --weights-only"
        )
    load_model(model, state)
    names = table_parameter_names(model)
    live = optimizer.state()
    moments = {
        name: _moments(state, name, names.get(name)) if parameter.numel() else live.get(name, {})
        for name, parameter in model.named_parameters()
    }
    optimizer.load_state(moments, state.step)
    torch.set_rng_state(state.dense[_GENERATOR])


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value of nested mappings, such as a configuration's dump."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _text(state: CheckpointState, *path: str) -> str:
    value: Any = state.attributes
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str):
        raise CheckpointError(
            f"a run's checkpoint must hold {'.'.join(path)}; step {state.step} does not; "
            "it was not written by `mfdist train`"
        )
    return value


def _moments(state: CheckpointState, name: str, table: str | None) -> dict[str, Tensor]:
    if table is not None:
        held = _held(state, table)
        return {} if held is None else dict(held.optimizer)
    paths = {moment: f"optimizer/{name}/{moment}" for moment in _MOMENTS}
    return {moment: state.dense[path] for moment, path in paths.items() if path in state.dense}


def _weight(state: CheckpointState, name: str, table_names: Mapping[str, str]) -> Tensor | None:
    if name in table_names:
        table = _held(state, table_names[name])
        return None if table is None else table.weight
    return state.dense.get(f"model/{name}")


def _held(state: CheckpointState, name: str) -> TableState | TableShard | None:
    shards = state.shards.get(name)
    return shards[0] if shards else state.tables.get(name)


def _tables(model: Transformer) -> Iterator[Table]:
    return (module for module in model.modules() if isinstance(module, Table))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"

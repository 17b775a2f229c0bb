"""The run's optimiser: AdamW for dense parameters; AdamW or a row optimiser for tables; a schedule for each."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfdist.config import DenseGroupConfig, OptimizerConfig, ParameterGroupConfig, TableGroupConfig
from mfdist.kernels.row_update import squared_sums
from mfdist.optim import STATE_DTYPES, RowAdagrad, RowAdam, RowOptimizer, RowSGD, RowState
from mfdist.spec import Region, TableSpec
from mfdist.table import Table
from mfdist.tables.sharded import ShardedTable
from mfdist.training.world import World

#: Tables learn at this multiple of the dense rate where none is given. Source of 3: MemoryFormer, section 3.1.
TABLE_LR_MULTIPLE = {"adamw": 3.0, "adam": 3.0, "rowwise_adagrad": 10.0}
#: Added to a norm before it is divided by, as torch does when it clips.
_CLIP_EPS = 1e-6


def table_parameter_names(model: nn.Module) -> dict[str, str]:
    """Return the parameter name of every local table's rows → the table's name."""
    return {
        f"{path}.{parameter}": module.spec.name
        for path, module in model.named_modules()
        if isinstance(module, Table)
        for parameter, _ in module.named_parameters(recurse=False)
    }


class RunOptimizer:
    """AdamW with a dense and a table group, clipped and scheduled apart; or a row optimiser in place of the second.

    Norm weights and biases (one-dimensional parameters) are not decayed; token embeddings may have a rate of their own,
    which follows the dense schedule. Call order a step: `set_rates`, backward, `gradient_norms`, `step`. Fused tables
    are updated in backward, at the rate set before; everything else in `step`. On a GPU none of them waits for the
    device, but for rows that a row optimiser trains without being fused.

    Args:
        model: its tables are fused here, where the configuration says so.
        config: both groups' settings.
        seed: of stochastic rounding; each table has its own, which follows from its name.
        world: the ranks that hold parts of the tables; by default this process holds them all.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, seed: int = 0, world: World | None = None) -> None:
        assert config.dense.lr is not None
        self._world = world
        self._counted_elsewhere = _counted_elsewhere(model, world)
        table_lr = config.tables.lr or TABLE_LR_MULTIPLE[config.tables.rule] * config.dense.lr
        self.is_fused = config.tables.is_fused
        self._nothing = torch.zeros((), device=next(model.parameters()).device)
        self._peak_lr = {"dense": config.dense.lr, "tables": table_lr}
        self._configs: dict[str, ParameterGroupConfig] = {"dense": config.dense, "tables": config.tables}
        tables = table_parameter_names(model)
        #: name of the rows' parameter → the rows and what trains them, where that is a row optimiser
        self._rows = _row_trained(model, config.tables, table_lr, seed) if config.tables.rule != "adamw" else {}
        self._cut_rows = _cut_rows(model) if config.tables.rule == "rowwise_adagrad" else {}
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = {id(parameter): name for name, parameter in named}
        self._parameters: dict[str, list[Tensor]] = {
            "dense": [parameter for name, parameter in named if name not in tables],
            "tables": [parameter for name, parameter in named if name in tables],
        }
        groups = self._groups(_embeddings(model), config.dense)
        #: group → its AdamW, where it has parameters for one
        self._adamw = {
            name: torch.optim.AdamW(chosen, fused=True)
            for name in self._parameters
            if (chosen := [group for group in groups if group["group"] == name])
        }

    def _groups(self, embeddings: set[int], dense: DenseGroupConfig) -> list[dict[str, Any]]:
        """Return AdamW's groups: parameters of one kind, decay and share of their kind's rate."""
        chosen: dict[tuple[str, float, bool], list[Tensor]] = {}
        for name, parameters in self._parameters.items():
            for parameter in parameters:
                if self.names[id(parameter)] not in self._rows:
                    share = dense.embedding_lr_multiple if id(parameter) in embeddings else 1.0
                    chosen.setdefault((name, share, parameter.ndim > 1), []).append(parameter)
        groups = []
        for (name, share, is_decayed), parameters in chosen.items():
            settings = self._configs[name]
            groups.append(
                {
                    "params": parameters,
                    "lr": share * self._peak_lr[name],
                    "betas": settings.betas,
                    "eps": settings.eps,
                    "weight_decay": settings.weight_decay if is_decayed else 0.0,
                    "group": name,
                    "share": share,
                }
            )
        return groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups of parameters, each with its settings and the name of our group."""
        return [group for adamw in self._adamw.values() for group in adamw.param_groups]

    def learning_rates(self, step: int, num_steps: int) -> dict[str, float]:
        """Return the rates of step `step` (counted from 0) of `num_steps`, by group."""
        return {
            name: self._peak_lr[name] * lr_factor(settings, step, num_steps) for name, settings in self._configs.items()
        }

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the rates of the next update, by group; before backward, which is the update of fused tables."""
        for group in self.param_groups:
            group["lr"] = group["share"] * rates[group["group"]]
        for _, state in self._rows.values():
            state.lr = rates["tables"]

    def gradient_norms(self) -> dict[str, Tensor]:
        """Return the 2-norm of each group's gradients, scalars on their device; 0 for fused tables, which have none."""
        norms = {}
        for name, parameters in self._parameters.items():
            gradients = [
                parameter.grad
                for parameter in parameters
                if parameter.grad is not None and id(parameter) not in self._counted_elsewhere
            ]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else self._nothing
            if name == "tables" and self._world is not None and not self._world.is_alone:
                norm = self._world.total(norm.square()).sqrt()
            norms[name] = norm
        return norms

    def step(self, norms: Mapping[str, Tensor], is_sound: Tensor | None = None) -> None:
        """Apply one update to what is not fused, and drop the gradients.

        Args:
            norms: what `gradient_norms` returned; a group whose norm exceeds its `clip_norm` is scaled down to it.
            is_sound: a boolean on the parameters' device; False leaves parameters and states as they are.
        """
        scales = {  # by which gradients are divided
            name: ((norms[name] + _CLIP_EPS) / limit).clamp(min=1.0)
            for name in self._parameters
            if (limit := self._configs[name].clip_norm)
        }
        for name, adamw in self._adamw.items():
            # What torch's gradient scaler sets: AdamW reads both on the device.
            adamw.grad_scale = scales.get(name)  # type: ignore[attr-defined]
            adamw.found_inf = None if is_sound is None else (~is_sound).float()  # type: ignore[attr-defined]
            adamw.step()
        for name, (rows, state) in self._rows.items():
            if rows.grad is not None:
                # A row that no lookup read has a gradient of zeros, and is to stay as it is.
                is_read = rows.grad.any(dim=1)
                if (scale := scales.get("tables")) is not None:
                    rows.grad.div_(scale)
                if is_sound is not None:
                    rows.grad.div_(is_sound)  # by 0, which leaves no gradient finite, and so no row changed
                mean_squares = None
                if (spec := self._cut_rows.get(name)) is not None:
                    is_read, mean_squares = self._over_whole_rows(spec, state.region, rows.grad, is_read)
                touched = is_read.nonzero().flatten()
                if mean_squares is not None:
                    mean_squares = mean_squares[touched]
                state.update(rows, rows.grad, touched=touched, mean_squares=mean_squares, name=name)
        self.drop_gradients()

    def _over_whole_rows(self, spec: TableSpec, held: Region, grads: Tensor, is_read: Tensor) -> tuple[Tensor, Tensor]:
        """Return of each held row whether any of its columns has a gradient, and the mean of all their squares."""
        assert self._world is not None
        first, end = held.rows
        parts = torch.zeros(2, spec.num_rows, device=grads.device)
        parts[0, first:end], parts[1, first:end] = is_read, squared_sums(grads)
        num_read, squares = self._world.total(parts)[:, first:end]
        return num_read > 0, squares / spec.row_dim

    def drop_gradients(self) -> None:
        """Forget the gradients without an update."""
        for parameter in self._all():
            parameter.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return parameter name → its states by name, aliasing the live ones; AdamW has none before its first step."""
        moments = {
            self.names[id(parameter)]: dict(state)
            for adamw in self._adamw.values()
            for parameter, state in adamw.state.items()
        }
        return moments | {name: dict(state.tensors) for name, (_, state) in self._rows.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Take over the states of parameters by name after `step` updates; AdamW's not named start afresh.

        Raises:
            ConfigError: a table's states are not its row optimiser's.
        """
        for name, (_, row_state) in self._rows.items():
            row_state.load(dict(state.get(name, {})), step)
        for group, adamw in self._adamw.items():
            for parameter in self._parameters[group]:
                if kept := state.get(self.names[id(parameter)]):
                    moments = {key: value.to(device=parameter.device, copy=True) for key, value in kept.items()}
                    # Where AdamW keeps its count once it is fused: beside the parameter.
                    count = torch.tensor(float(step), device=parameter.device)
                    adamw.state[parameter] = {"step": count, **moments}

    def _all(self) -> Iterable[Tensor]:
        return (parameter for parameters in self._parameters.values() for parameter in parameters)


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _counted_elsewhere(model: nn.Module, world: World | None) -> set[int]:
    """Return the rows whose gradients the first rank counts, having the same copy of them."""
    if world is None or world.is_first:
        return set()
    return {
        id(table.weight)
        for table in model.modules()
        if isinstance(table, ShardedTable) and table.plan.kind == "replicated"
    }


def _row_trained(
    model: nn.Module, config: TableGroupConfig, lr: float, seed: int
) -> dict[str, tuple[nn.Parameter, RowState]]:
    """Return every table's rows and what trains them, by the parameter's name; tables are fused if that is asked."""
    trained = {}
    for path, table in model.named_modules():
        if isinstance(table, Table):
            rows = table.get_parameter("weight")
            optimizer = _row_optimizer(config, lr, _seed_of(table.spec.name, seed))
            state = table.fuse(optimizer).row_state if config.is_fused else RowState(optimizer, rows, table.region)
            assert state is not None
            trained[f"{path}.weight"] = (rows, state)
    return trained


def _cut_rows(model: nn.Module) -> dict[str, TableSpec]:
    """Return the tables whose rows no rank holds whole, by the name of the rows' parameter."""
    return {
        f"{path}.weight": table.spec
        for path, table in model.named_modules()
        if isinstance(table, ShardedTable) and table.plan.num_column_parts > 1
    }


def _row_optimizer(config: TableGroupConfig, lr: float, seed: int) -> RowOptimizer:
    decay = config.weight_decay
    match config.rule:
        case "sgd":
            return RowSGD(lr=lr, weight_decay=decay, seed=seed)
        case "rowwise_adagrad":
            return RowAdagrad(lr=lr, weight_decay=decay, seed=seed, eps=config.eps, decay=config.accumulator_decay)
        case _:
            kept = STATE_DTYPES[config.state_dtype]
            return RowAdam(lr=lr, weight_decay=decay, seed=seed, betas=config.betas, eps=config.eps, state_dtype=kept)


def _seed_of(table: str, seed: int) -> int:
    """Return a table's own seed, the same on all machines."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{table}".encode()).digest()[:7], "little")


def lr_factor(settings: ParameterGroupConfig, step: int, num_steps: int) -> float:
    """Return the share of the peak rate used at `step` (counted from 0): linear warm-up, then the schedule's fall."""
    num_warmup = max(1, round(settings.warmup_fraction * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - 1 - num_warmup)
    floor = settings.min_lr_fraction
    match settings.schedule:
        case "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        case "linear":
            return floor + (1 - floor) * (1 - min(1.0, progress))
        case "constant":
            return 1.0

"""AdamW over two groups, the dense parameters and the tables, each with its own rate, schedule, decay and clipping."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mfdist.config import OptimizerConfig, ParameterGroupConfig
from mfdist.table import Table

#: Tables learn at this multiple of the dense rate where none is given. Source: MemoryFormer, section 3.1.
TABLE_LR_MULTIPLE = 3.0


def table_parameter_names(model: nn.Module) -> dict[str, str]:
    """Return the parameter name of every local table's rows → the table's name."""
    return {
        f"{path}.{parameter}": module.spec.name
        for path, module in model.named_modules()
        if isinstance(module, Table)
        for parameter, _ in module.named_parameters(recurse=False)
    }


class RunOptimizer:
    """AdamW with a dense and a table group, clipped and scheduled apart.

    Norm weights and biases (one-dimensional parameters) are not decayed. Call order a step: backward, `gradient_norms`,
    `step`.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        assert config.dense.lr is not None
        tables = table_parameter_names(model)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = {id(parameter): name for name, parameter in named}
        self._configs = {"dense": config.dense, "tables": config.tables}
        self._peak_lr = {"dense": config.dense.lr, "tables": config.tables.lr or TABLE_LR_MULTIPLE * config.dense.lr}
        self._parameters: dict[str, list[Tensor]] = {
            "dense": [parameter for name, parameter in named if name not in tables],
            "tables": [parameter for name, parameter in named if name in tables],
        }
        groups = []
        for name, parameters in self._parameters.items():
            settings = self._configs[name]
            for is_decayed in (True, False):
                chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == is_decayed]
                if chosen:
                    groups.append(
                        {
                            "params": chosen,
                            "lr": self._peak_lr[name],
                            "betas": settings.betas,
                            "eps": settings.eps,
                            "weight_decay": settings.weight_decay if is_decayed else 0.0,
                            "group": name,
                        }
                    )
        self.adamw = torch.optim.AdamW(groups, fused=True)

    def learning_rates(self, step: int, num_steps: int) -> dict[str, float]:
        """Return the rates of step `step` (counted from 0) of `num_steps`, by group."""
        return {
            name: self._peak_lr[name] * lr_factor(settings, step, num_steps) for name, settings in self._configs.items()
        }

    def gradient_norms(self) -> dict[str, Tensor]:
        """Return the 2-norm of each group's gradients, scalars on their device."""
        norms = {}
        for name, parameters in self._parameters.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms[name] = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        return norms

    def step(self, rates: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Apply one update at the given rates, and drop the gradients.

        A group whose norm exceeds its `clip_norm` is scaled down to it first; the others cost no pass over their
        gradients.
        """
        for name, parameters in self._parameters.items():
            limit = self._configs[name].clip_norm
            if limit and norms[name] > limit:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norms[name]))
        for group in self.adamw.param_groups:
            group["lr"] = rates[group["group"]]
        self.adamw.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients without an update."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return parameter name → {`step`, `exp_avg`, `exp_avg_sq`}, aliasing the live state; empty before a step."""
        return {self.names[id(parameter)]: dict(state) for parameter, state in self.adamw.state.items()}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over the state of parameters by name; those not named start afresh."""
        for parameter in self._all():
            if kept := state.get(self.names[id(parameter)]):
                self.adamw.state[parameter] = {
                    key: value.to(device=parameter.device, copy=True) for key, value in kept.items()
                }

    def _all(self) -> Iterable[Tensor]:
        return (parameter for parameters in self._parameters.values() for parameter in parameters)


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

"""Which layers of a model are linear, and which of them are meant."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from mfdist.errors import ConfigError

#: A shell pattern of names, a compiled regular expression (matched anywhere in a name), or a rule of name and module.
Pattern: TypeAlias = str | re.Pattern[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class LinearLayer:
    """A layer that multiplies by a matrix: y = x · weightᵀ + bias."""

    name: str
    module: nn.Module
    weight: Tensor  # [out, in]
    bias: Tensor | None


def chosen_layers(
    model: nn.Module, include: Pattern | Iterable[Pattern], exclude: Pattern | Iterable[Pattern], bits: int
) -> list[LinearLayer]:
    """Return the linear layers that are included and not excluded, in the order of the model's modules.

    Linear are `nn.Linear` and the `Conv1D` of transformers; not classes derived from them, which other code may know.

    Raises:
        ConfigError: there is none, or `bits` does not divide the width of one.
    """
    inner = [(name, module) for name, module in model.named_modules() if name]  # the model itself has no place
    linear = [layer for name, module in inner if (layer := _as_linear(name, module)) is not None]
    wanted, unwanted = _listed(include), _listed(exclude)
    chosen = [layer for layer in linear if _fits(layer, wanted) and not _fits(layer, unwanted)]
    if not chosen:
        raise ConfigError(
            f"include must fit linear layers of the model; got {_told(wanted)}"
            f"{f', exclude {_told(unwanted)}' if unwanted else ''}; it has {_some([layer.name for layer in linear])}"
        )
    if odd := [layer for layer in chosen if layer.weight.shape[1] % bits]:
        width = odd[0].weight.shape[1]
        fitting = [count for count in range(1, 17) if not any(layer.weight.shape[1] % count for layer in chosen)]
        raise ConfigError(
            f'bits must divide in_features of every layer; got bits={bits} and in_features={width} of "{odd[0].name}"'
            f"{f' and {len(odd) - 1} more such layers' if len(odd) > 1 else ''}; "
            f"take bits of {', '.join(map(str, fitting))}, or exclude them"
        )
    return chosen


def _as_linear(name: str, module: nn.Module) -> LinearLayer | None:
    if type(module) is nn.Linear:
        return LinearLayer(name, module, module.weight.detach(), module.bias)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return LinearLayer(name, module, module.get_parameter("weight").detach().T, module.get_parameter("bias"))
    return None


def _listed(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    return [patterns] if isinstance(patterns, str | re.Pattern) or callable(patterns) else list(patterns)


def _fits(layer: LinearLayer, patterns: list[Pattern]) -> bool:
    return any(_matches(layer, pattern) for pattern in patterns)


def _matches(layer: LinearLayer, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(layer.name, pattern)
    return (
        pattern.search(layer.name) is not None if isinstance(pattern, re.Pattern) else pattern(layer.name, layer.module)
    )


def _told(patterns: list[Pattern]) -> str:
    return ", ".join(_named(pattern) for pattern in patterns)


def _named(pattern: Pattern) -> str:
    if isinstance(pattern, str):
        return pattern
    return pattern.pattern if isinstance(pattern, re.Pattern) else "a rule"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"

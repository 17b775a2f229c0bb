"""`replace_linear`: chosen linear layers of any model become memory layers, fitted to the model's own activations."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfdist.conversion.centroids import fit
from mfdist.conversion.choice import LinearLayer, Pattern, chosen_layers
from mfdist.conversion.converted_linear import ConvertedLinear
from mfdist.errors import ConfigError
from mfdist.layers import MemoryLayer

#: Fewer tokens say nothing of a layer's activations.
_LEAST_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class ReplacedLayer:
    """One layer that was replaced."""

    name: str
    in_features: int
    out_features: int
    num_rows: int
    table_bytes: int
    hit_share: float | None  # of its rows, those that the sample read
    error: float | None  # ‖y − ŷ‖ / ‖y‖ on activations that were not fitted, biases left out of y


@dataclass(frozen=True)
class Replacement:
    """What `replace_linear` did; printed, it is a table of the layers."""

    layers: tuple[ReplacedLayer, ...]

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'in':>6} {'out':>6} {'rows':>9} {'MiB':>8} {'rows hit':>9} {'error':>6}"]
        for layer in self.layers:
            hit = "" if layer.hit_share is None else f"{layer.hit_share:.1%}"
            error = "" if layer.error is None else f"{layer.error:.3f}"
            lines.append(
                f"{layer.name:<{width}}  {layer.in_features:>6} {layer.out_features:>6} {layer.num_rows:>9,} "
                f"{layer.table_bytes / 2**20:>8.1f} {hit:>9} {error:>6}"
            )
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    *,
    include: Pattern | Iterable[Pattern],
    exclude: Pattern | Iterable[Pattern] = (),
    bits: int = 8,
    sample: Iterable[Any] | None,
    score: str = "paper",
    temperature: float = 2.0,
    max_tokens: int = 16384,
) -> Replacement:
    """Replace linear layers by memory layers, in place, fitted so that the model goes on from near where it was.

    Layers are replaced one after another, in the order of the model's modules; each is fitted to the activations that
    it gets once those before it are replaced. Afterwards the model is trained, saved and sharded like any other:
    `state_dict` holds all that the fit decided, and a model that was made anew and converted with `sample=None` and the
    same settings loads it.

    Args:
        model: any module; `nn.Linear`s and the `Conv1D`s of transformers can be replaced.
        include: which layers: shell patterns of their names ("*.mlp.*"), compiled regular expressions, rules
            (name, module) → bool, or several of these.
        exclude: the same, of layers to leave alone; heads that share a weight with an embedding, say.
        bits: sign bits a chunk, dividing in_features of each. Fewer bits come closer and read more rows.
        sample: inputs of the model: tensors, or tuples or dicts of arguments, of text as it will see. None draws random
            rows instead.
        score, temperature: of the memory layers; see `MemoryLayer`. 2 fits best with the paper's score.
        max_tokens: activations of so many tokens are held, of one layer at a time.

    Returns:
        Each layer's size and error.

    Raises:
        ConfigError: no layer fits, `bits` does not divide a width, or a layer gets too few tokens from the sample;
            nothing was replaced. Or activations are not finite; what was replaced stays so.

    Cost: one pass of the sample a layer, and one more; memory for [max_tokens, in_features] and [in_features]².
    """
    chosen = chosen_layers(model, include, exclude, bits)
    batches = None if sample is None else list(sample)
    if batches is not None:
        _check_reached(model, chosen, batches)
    done = []
    for layer in chosen:
        made = _made(layer, bits, score, temperature)
        error = hit_share = None
        if batches is not None:
            x = _activations(model, [layer], batches, max_tokens)[layer.name]
            if not x.isfinite().all():
                raise ConfigError(f'activations must be finite to be fitted; those of "{layer.name}" are not')
            found = fit(x, layer.weight, made.memory.hash)
            _fill(made, layer, found.mean, found.scale, found.rows)
            error, hit_share = found.error, found.hit_share
        _put(model, layer, made)
        done.append(
            ReplacedLayer(
                name=layer.name,
                in_features=made.in_features,
                out_features=made.out_features,
                num_rows=made.memory.hash.num_rows,
                table_bytes=made.memory.table.spec.num_bytes,
                hit_share=hit_share,
                error=error,
            )
        )
    return Replacement(tuple(done))


def _made(layer: LinearLayer, bits: int, score: str, temperature: float) -> ConvertedLinear:
    num_outputs, num_inputs = layer.weight.shape
    memory = MemoryLayer(
        num_inputs,
        num_outputs,
        bits,
        score,
        temperature=temperature,
        name=layer.name,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    return ConvertedLinear(memory).train(layer.module.training)


@torch.no_grad()
def _fill(made: ConvertedLinear, layer: LinearLayer, mean: Tensor, scale: Tensor, rows: Tensor) -> None:
    made.shift.copy_(mean)
    made.inverse_scale.copy_(1 / scale)
    made.memory.table.get_parameter("weight").copy_(rows)
    bias = layer.weight.float() @ mean
    assert made.memory.bias is not None
    made.memory.bias.copy_(bias if layer.bias is None else bias + layer.bias.float())


def _put(model: nn.Module, layer: LinearLayer, made: ConvertedLinear) -> None:
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # children by every name they have
            if child is layer.module:
                setattr(module, name, made)
    _leave_fast_paths(model)


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformer encoders from inference kernels of their own, which read linear layers' weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
            isinstance(inner, ConvertedLinear) for inner in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # of the fast path alone


def _check_reached(model: nn.Module, chosen: list[LinearLayer], batches: list[Any]) -> None:
    found = _activations(model, chosen, batches, _LEAST_TOKENS)
    for layer in chosen:
        count = len(found[layer.name])
        if count < _LEAST_TOKENS:
            raise ConfigError(
                f'the sample must give each layer {_LEAST_TOKENS} tokens or more; "{layer.name}" got {count}; '
                f"{'give more text' if count else 'exclude it, or give inputs that use it'}"
            )


def _activations(model: nn.Module, layers: list[LinearLayer], batches: list[Any], max_tokens: int) -> dict[str, Tensor]:
    """Return the first `max_tokens` activations [N, d] in fp32 that each layer gets from the batches."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def keep(name: str, x: Tensor) -> None:
        left = max_tokens - sum(map(len, found[name]))
        if left > 0:
            found[name].append(x.detach().reshape(-1, x.shape[-1])[:left].float())

    with _watching(layers, keep), _evaluating(model), torch.no_grad():
        for batch in batches:
            _call(model, batch)
            if all(sum(map(len, parts)) >= max_tokens for parts in found.values()):
                break
    widths = {layer.name: layer.weight.shape[1] for layer in layers}
    return {name: torch.cat(parts) if parts else torch.empty(0, widths[name]) for name, parts in found.items()}


@contextmanager
def _watching(layers: list[LinearLayer], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    def watcher(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: keep(name, next(iter((*args, *kwargs.values()))))

    hooks = [layer.module.register_forward_pre_hook(watcher(layer.name), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)

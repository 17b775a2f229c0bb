"""How fast models write, a token at a time: a MemoryFormer beside its dense twin, on one device, in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfdist.config import ModelConfig
from mfdist.errors import ConfigError, InternalError
from mfdist.models import Transformer, build_model
from mfdist.models.attention import KeyValueCache

_PROMPT_TOKENS = 16
#: Tokens and caches → the logits after the last token; `Transformer.next_logits`, compiled or not.
_Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Decoding:
    """What one model did."""

    tokens_per_s: float  # median over the rounds
    ratio: float  # of this speed to the first model's, median over the rounds
    ratio_range: tuple[float, float]  # the least and the most of any round


def random_model(
    config: ModelConfig, *, num_distinct: int | None = None, dtype: torch.dtype, device: str = "cpu"
) -> Transformer:
    """Return a model of random weights, for inference.

    Args:
        config: its shape.
        num_distinct: layers that have weights of their own; the others take theirs in turn, so that a deep model fits
            into memory. A token reads as much, and as little of it is in a cache, while these few are larger than one.
        dtype: of all weights and rows.
        device: where they are; `meta` has none, to count.

    Raises:
        ConfigError: there are fewer layers.
    """
    num_distinct = config.num_layers if num_distinct is None else num_distinct
    if not 1 <= num_distinct <= config.num_layers:
        raise ConfigError(f"distinct layers must lie in 1..model.num_layers={config.num_layers}; got {num_distinct}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not cast afterwards: tables of fp32 would need the memory first
    try:
        model = build_model(config.model_copy(update={"num_layers": num_distinct}), device=device)
    finally:
        torch.set_default_dtype(before)
    model.blocks = nn.ModuleList(model.blocks[index % num_distinct] for index in range(config.num_layers))
    return model.eval().requires_grad_(False)


def dense_twin(model: Transformer) -> Transformer:
    """Return the dense twin of a model's shape in its dtype and on its device, freshly initialised, for inference."""
    before = torch.get_rng_state()
    config = model.config.model_copy(update={"kind": "dense"})
    weight = model.embedding.weight
    twin = build_model(config, device=weight.device).to(weight.dtype)
    torch.set_rng_state(before)
    return twin.eval().requires_grad_(False)


@torch.inference_mode()
def measure_decoding(
    models: Mapping[str, Transformer],
    *,
    batch: int = 1,
    num_tokens: int = 32,
    rounds: int = 7,
    is_compiled: bool = False,
) -> dict[str, Decoding]:
    """Return how fast each model decodes sequences after a short prompt.

    Tokens are random, and others every time: the rows that a token reads are in no cache because of the last one.

    Args:
        models: by name, the one to compare with first; all of one vocabulary and on one device.
        batch: sequences that are written at once.
        num_tokens: that each writes in a turn, of each sequence.
        rounds: turns of each; one more comes first and does not count.
        is_compiled: what a token takes is compiled by torch.compile.

    Raises:
        ConfigError: no token fits behind the prompt.
        InternalError: a CUDA graph did not give the logits of the model.

    Cost: on a CPU with one thread time is processor time, which is right on a busy machine too. On a GPU a token is one
        replay of a CUDA graph, always at the prompt's end: a graph has one shape.
    """
    if (most := min(model.config.max_seq_len for model in models.values())) <= _PROMPT_TOKENS:
        raise ConfigError(
            f"model.max_seq_len must be more than the {_PROMPT_TOKENS} tokens of the prompt; got {most}; raise it"
        )
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    calls: dict[str, _Call] = {
        name: torch.compile(model.next_logits, dynamic=False) if is_compiled else model.next_logits
        for name, model in models.items()
    }
    for number in range(rounds + 1):
        for name, model in models.items():
            config = model.config
            length = min(_PROMPT_TOKENS + num_tokens, config.max_seq_len)
            tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
            device = model.embedding.weight.device
            taken = _decode_s(model, calls[name], tokens.to(device)) / (length - _PROMPT_TOKENS)
            if number:
                seconds[name].append(taken / batch)
    first = next(iter(seconds.values()))
    ratios = {name: [base / mine for base, mine in zip(first, own, strict=True)] for name, own in seconds.items()}
    return {
        name: Decoding(
            1 / statistics.median(own), statistics.median(ratios[name]), (min(ratios[name]), max(ratios[name]))
        )
        for name, own in seconds.items()
    }


def _decode_s(model: Transformer, call: _Call, tokens: Tensor) -> float:
    """Return how long all tokens after the prompt took, each by the call."""
    device = tokens.device
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    caches = model.new_caches(len(tokens), tokens.shape[1])
    model.next_logits(tokens[:, :_PROMPT_TOKENS], caches).argmax(-1).tolist()
    if device.type == "cuda":
        step = _GraphedStep(call, tokens, caches)
        began = clock()
        for _ in range(_PROMPT_TOKENS, tokens.shape[1]):
            step.next()
        return clock() - began
    began = clock()
    for index in range(_PROMPT_TOKENS, tokens.shape[1]):
        call(tokens[:, index : index + 1], caches).argmax(-1).tolist()  # as sampling does, wait for the logits
    return clock() - began


class _GraphedStep:
    """The next token of each sequence as one CUDA graph, after what the caches hold now.

    The graph takes the token itself, by a position that it moves on, and finds the likeliest one of those that may
    follow: launching it and reading that are all that is left to do for the host.

    Args:
        call: what a token takes.
        tokens: [B, T], given one after another from the prompt's end on.
        caches: filled with the prompt.

    Raises:
        InternalError: the graph does not give the call's logits.
    """

    def __init__(self, call: _Call, tokens: Tensor, caches: Sequence[KeyValueCache]) -> None:
        seen = caches[0].length
        position = torch.full((1,), _PROMPT_TOKENS, device=tokens.device)
        self._read = tokens, position, caches  # a graph keeps no tensor of others alive

        def step() -> tuple[Tensor, Tensor]:
            for cache in caches:
                cache.length = seen
            logits = call(tokens.index_select(1, position), caches)
            position.add_(1)
            return logits, logits.argmax(-1)

        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, and chooses what is chosen by measuring
            for _ in range(3):
                expected, _ = step()
                position.fill_(_PROMPT_TOKENS)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            logits, self._likeliest = step()
        likeliest = self.next()
        if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2) or likeliest != logits.argmax(-1).tolist():
            raise InternalError("a CUDA graph must give the model's logits; it gave others")
        position.fill_(_PROMPT_TOKENS)

    def next(self) -> list[int]:
        """Write the next token of each sequence, and return those that would follow."""
        self._graph.replay()
        found: list[int] = self._likeliest.tolist()
        return found

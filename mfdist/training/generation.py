"""Writing text with a trained model: sampling, key-value cache, streaming."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfdist.errors import ConfigError
from mfdist.models import Transformer
from mfdist.training.checkpointed import load_run_model
from mfdist.training.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from mfdist.training.run import RunDirectory
from mfdist.training.step import autocast


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is sampled.

    Args:
        num_tokens: tokens written; the end of a document is never sampled, so exactly so many come.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely; 0 among all.
        top_p: sample among the most likely tokens that together hold this probability; 1 among all.
        seed: of the sampling.
    """

    num_tokens: int = 50
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("num_tokens", self.num_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2**63)"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name} must be {rule}; got {getattr(self, name)}")


@dataclass(frozen=True)
class Generator:
    """A model and its tokenizer, ready to write.

    A CPU computes in the parameters' own dtype: the precision is that of a GPU.
    """

    model: Transformer
    tokenizer: Tokenizer
    precision: str = "fp32"
    step: int | None = field(default=None, kw_only=True)

    def stream(self, prompt: str, config: GenerationConfig) -> Iterator[str]:
        """Yield the text that follows the prompt, piece by piece, whole characters only."""
        decoder = StreamDecoder(self.tokenizer)
        # A shell hands over bytes that are no UTF-8 as lone surrogates, which no tokenizer takes.
        prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for token in self.tokens(self.tokenizer.encode(prompt), config):
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.finish():
            yield rest

    def tokens(self, prompt: list[int], config: GenerationConfig) -> Iterator[int]:
        """Yield sampled token ids after the prompt's ids; an empty prompt starts a new document.

        Past the model's `max_seq_len` the older half of the context is forgotten each time it is full.
        """
        model, device = self.model, next(self.model.parameters()).device
        window = model.config.max_seq_len
        precision = "fp32" if device.type == "cpu" else self.precision
        randomness = torch.Generator().manual_seed(config.seed)
        context = prompt or [self.tokenizer.end_of_document]
        pending, caches = context[-window:], None
        context = list(pending)
        for _ in range(config.num_tokens):
            if caches is None or caches[0].length + len(pending) > window:
                pending = context[-window:] if caches is None else context[-(window // 2 or 1) :]
                with autocast(device, precision):
                    caches = model.new_caches(1, window)
            with torch.inference_mode(), autocast(device, precision):
                logits = model.next_logits(torch.tensor([pending], device=device), caches)[0].float().cpu()
                logits[self.tokenizer.end_of_document] = -torch.inf
                logits[self.tokenizer.vocab_size :] = -torch.inf
                token = _sample(logits, config, randomness)
            yield token
            pending = [token]
            context = [*context[-window:], token]


def load_generator(run: RunDirectory, step: int | None = None, *, map_tables: bool = False) -> Generator:
    """Return a generator for a committed step of a run, by default the last; see `load_run_model`."""
    model, found_step = load_run_model(run, step, map_tables=map_tables)
    precision = run.config.training.precision
    if precision == "bf16" and model.embedding.weight.is_cuda:
        # Once: autocast would cast whole tables at every token, and keep lookups from their one kernel.
        model, precision = model.to(torch.bfloat16), "fp32"
    return Generator(model, load_tokenizer(run.tokenizer_path), precision, step=found_step)


def _sample(logits: Tensor, config: GenerationConfig, randomness: torch.Generator) -> int:
    if config.temperature == 0:
        return int(logits.argmax())
    ordered, tokens = logits.sort(descending=True, stable=True)
    ordered = (ordered - ordered[0]) / config.temperature
    if config.top_k:
        ordered[config.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= config.top_p] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=randomness)])

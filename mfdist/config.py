"""The configuration of a run: typed, frozen, validated, read from TOML and written back to it.

A run is described by one TOML file with the tables `[model]`, `[data]`, `[optimizer.dense]`, `[optimizer.tables]`,
`[training]`, `[sharding]`, `[servers]`, `[checkpoint]` and `[launch]`. Presets are such files, shipped in
`mfdist/presets/`.
"""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from mfdist.config_errors import explain
from mfdist.config_places import CheckpointConfig, LaunchConfig, ServersConfig, ShardingConfig
from mfdist.config_values import Count, Decay, Fraction, NonNegative, Positive, Section
from mfdist.errors import ConfigError

MAX_BITS = 24


class ModelConfig(Section):
    """Shape of a transformer; `kind` alone decides between a MemoryFormer and its dense twin."""

    kind: Literal["memory", "dense"] = Field(
        default="memory", description="memory: lookup tables; dense: the Pythia-shaped twin"
    )
    num_layers: Count = Field(description="number of blocks")
    hidden_dim: Count = Field(description="width d of the residual stream")
    num_heads: Count = Field(description="attention heads; must divide hidden_dim")
    vocab_size: int = Field(default=0, ge=0, description="tokens; 0 takes the tokenizer's")
    max_seq_len: Count = Field(default=2048, description="longest sequence the model accepts, in tokens")
    bits: int = Field(default=8, ge=1, le=MAX_BITS, description="sign bits a chunk (tau); must divide hidden_dim")
    extra_bits: int = Field(default=2, ge=0, le=8, description="more bits in the second feed-forward layer's chunks")
    activation: Literal["none", "gelu"] = Field(
        default="none",
        description="function between the feed-forward layers; the paper has none, and found GELU to change nothing",
    )
    score: Literal["paper", "released"] = Field(
        default="paper", description="row weight: the paper's p(z), or ‖z‖₁·p(z)"
    )
    score_temperature: Positive = Field(default=1.0, description="t in p(z) = 1 / prod(1 + exp(-2|z|/t))")
    init_scale: Positive = Field(
        default=1.0, description="standard deviation of new rows, as a multiple of the paper's"
    )
    rotary_fraction: Fraction = Field(default=0.25, description="share of each head that is rotated by position")
    table_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="what rows are kept in; bf16 needs a rule in [optimizer.tables] that rounds stochastically",
    )

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_dim; got hidden_dim={self.hidden_dim}, num_heads={self.num_heads}"
            )
        if self.kind == "memory" and self.hidden_dim % self.bits:
            raise ValueError(f"bits must divide hidden_dim; got hidden_dim={self.hidden_dim}, bits={self.bits}")
        if self.kind == "memory" and self.bits + self.extra_bits > MAX_BITS:
            raise ValueError(f"bits + extra_bits must be at most {MAX_BITS}; got {self.bits} + {self.extra_bits}")
        return self


class DataConfig(Section):
    """Where text comes from and how it becomes tokens."""

    source: str = Field(
        default="python-stdlib",
        description="python-stdlib, hf:NAME, or a file or folder: .txt .md .rst .py .jsonl .parquet, compressed or not",
    )
    text_field: str = Field(
        default="text", description="field that holds the text in .jsonl, .parquet and Hugging Face data"
    )
    tokenizer: str = Field(
        default="bpe", description="bytes, bpe (trained on the source), or the path of a tokenizer.json"
    )
    vocab_size: int = Field(
        default=4096, ge=257, description="tokens of a trained BPE; other tokenizers bring their own"
    )
    validation_fraction: float = Field(default=0.02, gt=0.0, lt=0.5, description="share of the documents held out")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the split into training and validation documents")
    cache_dir: Path | None = Field(
        default=None, description="where tokenised data is kept; default $XDG_CACHE_HOME/mfdist"
    )


class ParameterGroupConfig(Section):
    """Settings of one group of parameters."""

    lr: Positive | None = Field(
        default=None, description="peak learning rate; tables have a default, see their own section"
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="decay of Adam's two moments")
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(default=0.1, description="decoupled weight decay")
    clip_norm: NonNegative = Field(default=1.0, description="largest gradient norm of the group; 0 does not clip")
    warmup_fraction: Fraction = Field(default=0.01, description="share of the steps in which lr rises linearly")
    min_lr_fraction: Fraction = Field(default=0.01, description="lr at the last step, as a share of the peak")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how lr falls after warm-up"
    )


class DenseGroupConfig(ParameterGroupConfig):
    """Everything that is not a row of a table: embedding, norms, biases, classifier head; the twin's matrices too."""

    embedding_lr_multiple: Positive = Field(
        default=1.0,
        description="peak learning rate of the token embedding, as a multiple of lr; it bears more than matrices do",
    )


class TableGroupConfig(ParameterGroupConfig):
    """How rows of tables are trained.

    By AdamW, as dense parameters are; or by a row optimiser, which updates the rows that a step reads, in the backward
    pass where it is fused. lr defaults to a multiple of the dense one: 3 for AdamW and Adam, 10 for row-wise Adagrad.
    """

    rule: Literal["adamw", "sgd", "rowwise_adagrad", "adam"] = Field(
        default="adamw", description="adamw updates all rows; the others, row optimisers, only those that a step reads"
    )
    fused: bool | None = Field(
        default=None,
        description="update rows in backward, without a gradient of the table; by default wherever rule allows it",
    )
    state_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        default="fp32", description="what rule adam keeps its moments in; fp8 takes a byte each"
    )
    accumulator_decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="share of the squares that rule rowwise_adagrad has accumulated which it keeps at an update; with "
        "1 it is Adagrad, with less its rates are Adam's",
    )

    @model_validator(mode="before")
    @classmethod
    def _unclipped_where_fused(cls, given: Any) -> Any:
        """Take 0 for clip_norm where tables are fused and it is not given."""
        if not isinstance(given, dict) or "clip_norm" in given:
            return given
        rule, fused = given.get("rule", "adamw"), given.get("fused")
        return {**given, "clip_norm": 0.0} if rule != "adamw" and fused in (None, True) else given

    @property
    def is_fused(self) -> bool:
        """Return whether rows are updated in backward."""
        return self.rule != "adamw" if self.fused is None else self.fused

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if self.is_fused and self.rule == "adamw":
            raise ValueError('fused=true needs a row optimiser; got rule="adamw"; rule="adam" is the nearest')
        if self.is_fused and self.clip_norm:
            raise ValueError(
                "clip_norm must be 0 where tables are fused, because their gradients never exist together; "
                f"got clip_norm={self.clip_norm}; leave it out, or set fused=false"
            )
        if self.rule == "sgd" and self.lr is None:
            raise ValueError('rule="sgd" has no usual rate; give optimizer.tables.lr')
        if self.accumulator_decay != 1 and self.rule != "rowwise_adagrad":
            raise ValueError(f'accumulator_decay is for rule="rowwise_adagrad"; got rule="{self.rule}"; leave it out')
        if self.state_dtype != "fp32" and self.rule != "adam":
            raise ValueError(
                f'state_dtype="{self.state_dtype}" is for rule="adam"; got rule="{self.rule}"; leave it out'
            )
        return self


class OptimizerConfig(Section):
    """Two groups: the dense parameters, which AdamW trains, and the tables."""

    dense: DenseGroupConfig = DenseGroupConfig(lr=1e-3)
    tables: TableGroupConfig = TableGroupConfig()

    @model_validator(mode="after")
    def _dense_lr(self) -> Self:
        if self.dense.lr is None:
            raise ValueError("optimizer.dense.lr must be given")
        return self


class TrainingConfig(Section):
    """How long, how large a batch, on what."""

    steps: Count = Field(description="optimiser steps")
    batch_size: Count = Field(description="sequences a step, over all micro-batches and ranks")
    micro_batches: Count = Field(default=1, description="gradient accumulation: parts a step's batch is split into")
    seq_len: Count = Field(description="tokens a sequence")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of initialisation and of the order of the data")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16: autocast; parameters stay as they are"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    cuda_graph: bool = Field(
        default=False,
        description="start forward and backward as one CUDA graph; for one GPU that holds the whole model",
    )
    eval_every: Count = Field(default=100, description="steps between validations")
    eval_sequences: Count = Field(
        default=64, description="validation sequences each time; the last validation takes them all"
    )
    sample_prompt: str = Field(default="def ", description="text the model continues after its last step; empty: none")
    is_deterministic: bool = Field(default=True, description="repeat a run bit for bit on the same device")
    twin_steps: int = Field(
        default=0, ge=0, description="steps to time the dense twin for, reported beside this model; 0 does not"
    )
    tensorboard: bool = Field(
        default=False, description="also write TensorBoard event files (pip install mfdist[tensorboard])"
    )

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "micro_batches must divide batch_size; "
                f"got batch_size={self.batch_size}, micro_batches={self.micro_batches}"
            )
        return self


class RunConfig(Section):
    """Everything that decides a run's numbers."""

    name: str = Field(default="run", description="name shown in reports")
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    sharding: ShardingConfig = ShardingConfig()
    servers: ServersConfig = ServersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.training.seq_len > self.model.max_seq_len:
            raise ValueError(
                "training.seq_len must be at most model.max_seq_len; "
                f"got {self.training.seq_len} > {self.model.max_seq_len}"
            )
        return self

    @model_validator(mode="after")
    def _check_tables(self) -> Self:
        tables = self.optimizer.tables
        if self.model.table_dtype == "bf16" and tables.rule == "adamw":
            raise ValueError(
                'model.table_dtype="bf16" needs a row optimiser, whose stochastic rounding keeps small updates; '
                'got optimizer.tables.rule="adamw"; take rowwise_adagrad or adam'
            )
        if tables.is_fused and self.training.micro_batches > 1:
            raise ValueError(
                "training.micro_batches must be 1 where tables are fused, because each backward updates them; "
                f"got micro_batches={self.training.micro_batches}; set optimizer.tables.fused=false to add gradients up"
            )
        return self

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        if not self.servers.addresses:
            return self
        if len(self.servers.addresses) % self.servers.replicas:
            raise ValueError(
                f"servers.addresses must be pairs where servers.replicas=2; got {len(self.servers.addresses)} of them"
            )
        if self.model.kind == "memory" and not self.optimizer.tables.is_fused:
            raise ValueError(
                "rows on servers are trained there, by a row optimiser; got "
                f'optimizer.tables.rule="{self.optimizer.tables.rule}"; take sgd, rowwise_adagrad or adam, fused'
            )
        if self.sharding.plan is not None or self.sharding.kind != "auto":
            raise ValueError("rows lie on servers or on ranks; got servers.addresses and a [sharding]; leave one out")
        if self.checkpoint.url:
            raise ValueError(
                "servers save in the run's folder, which they share with it; got checkpoint.url; leave it out"
            )
        return self

    def to_toml(self) -> str:
        """Return the whole configuration, defaults included, as TOML; `parse_config` reads back an equal value."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def preset_names() -> list[str]:
    """Return the names of the shipped presets, smallest model first."""
    files = resources.files("mfdist.presets").iterdir()
    found = {file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")}
    order = ("demo", "tiny", "small", "base")
    return [name for name in order if name in found] + sorted(found - set(order))


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset or a TOML file and apply `section.key=value` overrides, the last of a key winning.

    Args:
        name_or_path: a preset's name, or the path of a TOML file.
        overrides: strings such as `model.bits=10`; the value is TOML, or else taken as a plain string.

    Raises:
        ConfigError: no such file, not TOML, or a key or value that is wrong; the message names the nearest right key
            and where the wrong one stands.
    """
    text, origin = _read_source(str(name_or_path))
    return parse_config(text, origin=origin, overrides=overrides)


def parse_config(text: str, *, origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate TOML text as `load_config` does; `origin` names it in messages."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration must be TOML; {origin}: {error}") from None
    said: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        _assign(tree, key, value)
        said[key] = f"--set {override}"
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, text=text, origin=origin, overrides=said, keys=list(config_keys()))) from None


def _read_source(name_or_path: str) -> tuple[str, str]:
    if name_or_path in preset_names():
        return (resources.files("mfdist.presets") / f"{name_or_path}.toml").read_text("utf-8"), f"preset {name_or_path}"
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists():
        try:
            return path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(
                f"configuration file {path} cannot be read ({reason}); give a TOML file or one of {_presets()}"
            ) from None
    close = difflib.get_close_matches(name_or_path, preset_names(), n=1)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    raise ConfigError(f'configuration must be a TOML file or one of {_presets()}; got "{name_or_path}"{hint}')


def _presets() -> str:
    return ", ".join(preset_names())


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, raw = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f'--set takes section.key=value, such as model.bits=10; got "{override}"')
    try:
        return key, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key, raw


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f'--set {key}: "{section}" is a value, not a section')
    tree[last] = value


def config_keys() -> Iterator[str]:
    """Yield every dotted key a configuration may hold, in the order of the classes above."""
    yield from _keys_of(RunConfig, "")


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        nested = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if nested is None:
            yield prefix + name
        else:
            yield from _keys_of(nested, f"{prefix}{name}.")

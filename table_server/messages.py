"""What tables are, as messages: specs, regions, row optimisers and shards, there and back."""

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from mfdist.errors import ConfigError
from mfdist.optim import RowAdagrad, RowAdam, RowOptimizer, RowSGD
from mfdist.spec import Region, TableSpec
from mfdist.table_server.codec import dtype_code, dtype_name, dtype_of
from mfdist.table_server.proto import table_v1_pb2 as pb

_ROW_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_MAX_NAME_CHARS, _SHOWN_CHARS = 200, 40


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """A rectangle of a table, how its rows begin, and how they are trained.

    Raises:
        ConfigError: it is empty, does not lie in its table, begins with rows that are no numbers, or is trained by a
            rule that needs more of each row.
    """

    table: TableSpec
    region: Region
    optimizer: RowOptimizer | None
    std: float
    seed: int

    def __post_init__(self) -> None:
        whole, where = self.table.region, f'table "{self.table.name}"'
        _check_name(self.table.name)
        if not 0 <= self.std < math.inf:
            raise ConfigError(f"the std of first rows must be finite and 0 or more; got {self.std} for {where}")
        if self.table.dtype not in _ROW_DTYPES:
            raise ConfigError(f"rows must be fp32, fp16 or bf16 on a server; got {self.table.dtype} for {where}")
        if self.region.is_empty or self.region.intersection(whole) != self.region:
            raise ConfigError(
                f"a shard must be a part of its table; got rows {self.region.rows} and columns {self.region.columns} "
                f"of {whole.shape} for {where}"
            )
        if isinstance(self.optimizer, RowAdagrad) and self.region.columns != whole.columns:
            raise ConfigError(
                f"row-wise Adagrad needs whole rows on a server; got columns {self.region.columns} of "
                f"{self.table.row_dim} for {where}; plan it row_wise or table_wise, or train by adam or sgd"
            )


def quoted(name: str) -> str:
    """Return a name from outside as messages have it: in quotation marks, and only its beginning where it is long."""
    if len(name) <= _MAX_NAME_CHARS:
        return json.dumps(name, ensure_ascii=False)
    return f"{json.dumps(name[:_SHOWN_CHARS] + '…', ensure_ascii=False)}, {len(name)} characters"


def differences(known: ShardSpec, asked: ShardSpec) -> tuple[str, str]:
    """Return what one shard is that another is not, and what that is instead: `seed=3` and `seed=4`."""
    one, other = _facts(known), _facts(asked)
    names = [name for name in one | other if one.get(name) != other.get(name)]
    if "optimizer" in names:  # whose settings are then others anyway
        names = [name for name in names if not name.startswith("optimizer.")]
    first, second = (", ".join(f"{name}={facts.get(name)}" for name in names) for facts in (one, other))
    return first, second


def shard_message(shard: ShardSpec) -> pb.Shard:
    """Return a shard as a message."""
    spec, region = shard.table, shard.region
    return pb.Shard(
        table=pb.TableSpec(name=spec.name, num_rows=spec.num_rows, row_dim=spec.row_dim, dtype=dtype_code(spec.dtype)),
        region=pb.Region(
            row_begin=region.rows[0],
            row_end=region.rows[1],
            column_begin=region.columns[0],
            column_end=region.columns[1],
        ),
        optimizer=None if shard.optimizer is None else optimizer_message(shard.optimizer),
        std=shard.std,
        seed=shard.seed,
    )


def shard_of(message: pb.Shard) -> ShardSpec:
    """Return the shard that a message describes.

    Raises:
        ConfigError: there is no such shard.
    """
    spec, region = message.table, message.region
    _check_name(spec.name)  # before it is in other messages
    return ShardSpec(
        table=TableSpec(
            name=spec.name,
            num_rows=spec.num_rows,
            row_dim=spec.row_dim,
            dtype=dtype_of(spec.dtype, "a table's dtype"),
        ),
        region=Region(rows=(region.row_begin, region.row_end), columns=(region.column_begin, region.column_end)),
        optimizer=optimizer_of(message.optimizer) if message.HasField("optimizer") else None,
        std=message.std,
        seed=message.seed,
    )


def optimizer_message(optimizer: RowOptimizer) -> pb.RowOptimizer:
    """Return a row optimiser's settings as a message."""
    message = pb.RowOptimizer(lr=optimizer.lr, weight_decay=optimizer.weight_decay, seed=optimizer.seed)
    if isinstance(optimizer, RowAdagrad):
        message.rule, message.eps = pb.RowOptimizer.ROWWISE_ADAGRAD, optimizer.eps
        message.beta2 = optimizer.decay
    elif isinstance(optimizer, RowAdam):
        message.rule, message.eps = pb.RowOptimizer.ADAM, optimizer.eps
        message.beta1, message.beta2 = optimizer.betas
        message.state_dtype = dtype_code(optimizer.state_dtype)
    elif isinstance(optimizer, RowSGD):
        message.rule = pb.RowOptimizer.SGD
    else:
        raise ConfigError(f"servers train rows by sgd, row-wise Adagrad or adam; got {type(optimizer).__name__}")
    return message


def optimizer_of(message: pb.RowOptimizer) -> RowOptimizer:
    """Return the row optimiser that a message describes.

    Raises:
        ConfigError: there is none, or a number is out of range.
    """
    lr, weight_decay, seed = message.lr, message.weight_decay, message.seed
    for number in (lr, weight_decay, message.eps):
        if abs(number) > torch.finfo(torch.float32).max:
            raise ConfigError(f"a row optimiser's numbers must be finite in fp32; got {number}")
    if message.rule == pb.RowOptimizer.SGD:
        return RowSGD(lr=lr, weight_decay=weight_decay, seed=seed)
    if message.rule == pb.RowOptimizer.ROWWISE_ADAGRAD:
        decay = message.beta2 or 1.0  # which older clients leave out
        return RowAdagrad(lr=lr, weight_decay=weight_decay, seed=seed, eps=message.eps, decay=decay)
    if message.rule != pb.RowOptimizer.ADAM:
        raise ConfigError(f"a row optimiser must name its rule; got {message.rule}")
    return RowAdam(
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        eps=message.eps,
        betas=(message.beta1, message.beta2),
        state_dtype=dtype_of(message.state_dtype, "the moments' dtype"),
    )


def _check_name(name: str) -> None:
    if not name or len(name) > _MAX_NAME_CHARS or "/" in name:
        raise ConfigError(
            f'a table needs a name of at most {_MAX_NAME_CHARS} characters without "/"; got {quoted(name)}'
        )


def _facts(shard: ShardSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "num_rows": shard.table.num_rows,
        "row_dim": shard.table.row_dim,
        "dtype": dtype_name(shard.table.dtype),
        "rows": "[{}, {})".format(*shard.region.rows),
        "columns": "[{}, {})".format(*shard.region.columns),
        "std": shard.std,
        "seed": shard.seed,
        "optimizer": shard.optimizer and shard.optimizer.rule.kind,
    }
    for name, value in vars(shard.optimizer).items() if shard.optimizer else ():
        facts[f"optimizer.{name}"] = dtype_name(value) if isinstance(value, torch.dtype) else value
    return facts

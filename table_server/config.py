"""The configuration of a table server: one TOML file, frozen and validated, as that of a run."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mfdist.config_errors import explain
from mfdist.errors import ConfigError
from mfdist.table_server.channel import ChannelConfig
from mfdist.table_server.sections import (
    LimitsConfig,
    LogsConfig,
    MetricsConfig,
    Positive,
    Section,
    SecurityConfig,
    TracesConfig,
)


class ServerSection(Section):
    """What a server keeps, and how carefully."""

    data: Path | None = Field(default=None, description="folder of the server's log and checkpoints; one server each")
    listen: str = Field(default="127.0.0.1:0", description="HOST:PORT; port 0 takes a free one")
    durability: Literal["log", "checkpoint"] = Field(
        default="log",
        description="log: a push is acknowledged when it is on disk; checkpoint: at once, lost if the server dies",
    )
    consistency: Literal["synchronous", "asynchronous"] = Field(
        default="synchronous",
        description="synchronous: a step is the pushes of all clients; asynchronous: each push by itself",
    )
    max_staleness: int = Field(default=8, ge=0, description="asynchronous: steps a client may be ahead of the slowest")
    log_gib: Positive = Field(default=4.0, description="GiB of log after which the server checkpoints by itself")
    threads: int = Field(default=0, ge=0, description="threads that look up and update; 0: one for each core")
    wait_s: Positive = Field(default=300.0, description="longest wait for a late client")
    drain_s: Positive = Field(default=30.0, description="how long calls may still run after SIGTERM")


class ReplicationConfig(ChannelConfig):
    """The other server of a pair, which holds the same shards; how it is reached is as for any client.

    Both servers name each other; which of them is the primary is settled by clients, and may change.
    """

    peer: str = Field(
        default="", description="HOST:PORT of the other server; empty: none. Its token must have the right admin"
    )
    timeout_s: Positive = Field(
        default=10.0, description="how long the other one may be silent before it is taken to be gone"
    )


class ServerConfig(Section):
    """Everything a server is told before it starts."""

    server: ServerSection = ServerSection()
    replication: ReplicationConfig = ReplicationConfig()
    security: SecurityConfig = SecurityConfig()
    limits: LimitsConfig = LimitsConfig()
    metrics: MetricsConfig = MetricsConfig()
    logs: LogsConfig = LogsConfig()
    traces: TracesConfig = TracesConfig()


def load_server_config(path: Path | None) -> ServerConfig:
    """Read a configuration; None stands for an empty file.

    Raises:
        ConfigError: there is no such file, or a key or value is wrong; the message names line and nearest right key.
    """
    if path is None:
        return ServerConfig()
    try:
        text = path.read_text("utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"a server's configuration must be a TOML file; cannot read {path} ({reason})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration must be TOML; {path}: {error}") from None
    try:
        return ServerConfig.model_validate(tree)
    except ValidationError as error:
        keys = [
            f"{section}.{key}"
            for section, field in ServerConfig.model_fields.items()
            for key in getattr(field.annotation, "model_fields", {})
        ]
        raise ConfigError(explain(error, text=text, origin=str(path), overrides={}, keys=keys)) from None

"""The sections of a configuration that say where a run's parts are: on ranks, servers and hosts, and saved."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mfdist.config_values import Count, NonNegative, Positive, Section


class ShardingConfig(Section):
    """How tables are spread where there are several ranks; one rank by itself ignores it."""

    kind: Literal["auto", "row_wise", "column_wise", "table_wise", "grid", "replicated"] = Field(
        default="auto",
        description="auto: the planner chooses for each table; another kind: all tables alike, cut evenly",
    )
    plan: Path | None = Field(default=None, description="a plan in JSON, instead of a kind")
    deduplicate: bool = Field(default=True, description="send each row id once (row_wise, and grids of rows)")
    pooled: bool = Field(
        default=False, description="row_wise: owners send partial sums, not rows; equal up to rounding"
    )
    forward_dtype: Literal["fp32", "bf16", "fp8"] | None = Field(
        default=None, description="what rows and sums travel as; by default what they are computed in"
    )
    backward_dtype: Literal["fp32", "bf16", "fp8"] | None = Field(
        default=None, description="the same for their gradients"
    )
    hosts: Count | None = Field(default=None, description="hosts the ranks run on; by default what the launcher says")
    deadline_s: Positive = Field(default=300.0, description="longest wait for the slowest rank in an exchange")
    peer_memory: bool = Field(
        default=True, description="ranks of one host write into each other's memory where they can"
    )

    @model_validator(mode="after")
    def _check_plan(self) -> Self:
        if self.plan is not None and self.kind != "auto":
            raise ValueError(f'give a plan or a kind; got plan={self.plan} and kind="{self.kind}"')
        return self


class ServersConfig(Section):
    """Table servers that hold the rows instead of the ranks; see `mfdist serve`."""

    addresses: tuple[str, ...] = Field(
        default=(), description="HOST:PORT of each server; empty: the ranks hold the rows"
    )
    kind: Literal["auto", "whole", "row_wise", "column_wise", "table_wise"] = Field(
        default="auto",
        description="how tables are cut; whole: not, each lies on one server; auto: as the rule and sizes allow",
    )
    forward_dtype: Literal["fp32", "bf16", "fp8"] | None = Field(
        default=None, description="what sums travel as; by default what rows are kept in"
    )
    backward_dtype: Literal["fp32", "bf16", "fp8"] | None = Field(
        default=None, description="the same for their gradients"
    )
    replicas: Literal[1, 2] = Field(
        default=1,
        description="2: each row is on two servers, and addresses are those of pairs, one after the other; see mfdist "
        "serve --peer. Of launch.servers, two are a pair then",
    )
    deadline_s: Positive = Field(default=300.0, description="longest wait for a server, its restart included")
    failover_s: Positive = Field(
        default=3.0, description="how long the first of a pair may not answer before the second is asked to take over"
    )
    token_file: Path | None = Field(default=None, description="file with this client's token alone")
    ca: Path | None = Field(default=None, description="PEM of the authority of the servers' certificates; turns TLS on")
    certificate: Path | None = Field(default=None, description="this client's certificate, PEM, for mutual TLS")
    private_key: Path | None = Field(default=None, description="its key, PEM")
    server_name: str = Field(
        default="", description="name in the servers' certificates, where it is not that of the address"
    )
    insecure: bool = Field(default=False, description="talk to any address without TLS")


class ElasticConfig(Section):
    """How many trainers will do where there is no place for all of them, or where more are asked for."""

    min: int = Field(default=0, ge=0, description="fewest trainers to go on with; 0: all of launch.trainers are needed")
    max: int = Field(default=0, ge=0, description="most that mfdist scale may ask for; 0: any number")
    grow_s: Positive = Field(
        default=60.0,
        description="shortest time with fewer before a save and a new group with more, where there is place again",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max and self.min > self.max:
            raise ValueError(f"min must be at most max; got min={self.min}, max={self.max}")
        return self


class CheckpointConfig(Section):
    """How often the run is saved and how much is kept."""

    every: int = Field(
        default=200,
        ge=0,
        description="steps between checkpoints; the last step is saved too; 0: none, and nothing to go on from",
    )
    keep_last: Count = Field(
        default=2, description="checkpoints kept; older ones are removed after a newer one is committed"
    )
    keep_every: int = Field(default=0, ge=0, description="steps divisible by this are kept besides; 0: none")
    url: str = Field(
        default="",
        description="an object store to keep checkpoints in, such as s3://BUCKET/RUN; empty: the run's folder",
    )
    asynchronous: bool = Field(default=True, description="train on while a copy of the state is written")
    max_copy_gib: Positive = Field(
        default=4.0, description="GiB of host memory for that copy; with a larger state training waits"
    )
    incremental: bool = Field(default=True, description="share files that did not change with the checkpoint before")


class LaunchConfig(Section):
    """How `mfdist launch` runs the job on a Ray cluster; `mfdist train` ignores it."""

    trainers: Count = Field(
        default=1, description="processes that train together, each with a GPU or a share of the CPUs"
    )
    cpus: Positive | None = Field(
        default=None,
        description="CPUs, and threads, of a trainer; by default an equal share of the smallest host that has any",
    )
    servers: int = Field(default=0, ge=0, description="table servers; 0: the trainers hold the rows")
    server_cpus: NonNegative = Field(
        default=0.0, description="CPUs kept for a table server; 0: it takes what is left over"
    )
    server_data: Path | None = Field(
        default=None,
        description="folder on each host for logs and checkpoints of servers; by default in the run's folder, where "
        "any host can take a server over",
    )
    silence_s: Positive = Field(default=20.0, description="silence after which a trainer or server is taken for dead")
    stall_s: Positive = Field(default=1800.0, description="longest time without a step, or anything else to tell")
    start_s: Positive = Field(default=300.0, description="longest time that trainers or a server may take to start")
    replace_s: Positive = Field(
        default=60.0, description="longest wait for a place for trainers, before there are fewer"
    )
    stop_s: Positive = Field(
        default=120.0, description="longest time to finish a step and save, before trainers are ended"
    )
    max_failures: int = Field(
        default=5, ge=0, description="failures in a row, without a new checkpoint, before giving up"
    )
    backoff_s: NonNegative = Field(default=1.0, description="pause after the second of them; each later one doubles it")
    max_backoff_s: NonNegative = Field(default=60.0, description="longest such pause")
    elastic: ElasticConfig = ElasticConfig()

    @model_validator(mode="after")
    def _check_elastic(self) -> Self:
        if self.elastic.min > self.trainers:
            raise ValueError(
                f"elastic.min must be at most trainers; got trainers={self.trainers}, elastic.min={self.elastic.min}"
            )
        return self

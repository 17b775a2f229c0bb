"""The ranks a run trains on: how they find each other, and the little they tell each other besides tables' exchanges.

A process by itself is a world of one rank, in which all of this costs nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.checkpoint.ranks import OneRank, Ranks, StoreRanks
from mfdist.config import RunConfig
from mfdist.errors import ConfigError, ConsistencyError
from mfdist.models import Transformer
from mfdist.training.device import choose_device
from mfdist.training.spread import spread_tables

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank's view of all of them. Every method is called on all ranks, in the same order.

    Args:
        device: what this rank computes on.
        rank, world_size: which of how many; rank 0 speaks and writes for all.
        num_hosts: on how many hosts they run, equally many on each.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_hosts: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether this is the rank that speaks and writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Return whether there is no other rank."""
        return self.world_size == 1

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, the same bits on each and each time."""
        if self.is_alone:
            return value
        summed = value.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed

    def any(self, claim: bool) -> bool:
        """Return whether any rank claims it."""
        if self.is_alone:
            return claim
        # Between CPUs where the group reaches them, or the answer would wait for all that a GPU was given before.
        device = "cpu" if "cpu:" in dist.get_backend_config() else self.device
        claims = torch.tensor(float(claim), device=device)
        dist.all_reduce(claims)
        return bool(claims.item())

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, which must pickle, by rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_says(self, ask: Callable[[], T]) -> T:
        """Return what rank 0 answers, which must pickle; only it is asked.

        Raises:
            MfdistError: rank 0 failed; there its own error, elsewhere a ConsistencyError that tells of it.
        """
        if self.is_alone:
            return ask()
        answer: tuple[T | None, str | None] = (None, None)
        failure: BaseException | None = None
        if self.is_first:
            try:
                answer = (ask(), None)
            except BaseException as error:  # noqa: BLE001 - told to the others, then raised
                failure, answer = error, (None, str(error) or repr(error))
        told: list[Any] = [answer]
        dist.broadcast_object_list(told)
        if failure is not None:
            raise failure
        value, trouble = told[0]
        if trouble is not None:
            raise ConsistencyError(f"all ranks must be able to start; rank 0 could not: {trouble}")
        return cast(T, value)

    def on_first(self, act: Callable[[], object]) -> None:
        """Let rank 0 act while the others wait; see `first_says` for what is raised."""
        self.first_says(lambda: (act(), None)[1])

    def first_found(self, found: str | None) -> str | None:
        """Return what the lowest rank found that found anything, with its number where there are several."""
        for rank, theirs in enumerate(self.gather(found)):
            if theirs is not None:
                return str(theirs) if self.is_alone else f"{theirs} on rank {rank}"
        return None

    def checkpoint_ranks(self) -> Ranks:
        """Return the ranks as checkpoints know them."""
        return OneRank() if self.is_alone else StoreRanks.of_process_group()

    def alone(self, model: Transformer) -> "SpreadModel":
        """Return a model that no other rank has a part of."""
        return SpreadModel(forward=model, without_averaging=nullcontext)

    def spread(self, model: Transformer, config: RunConfig) -> "SpreadModel":
        """Shard the model's tables over the ranks, in place, and let DDP average the other gradients."""
        if self.is_alone:
            return self.alone(model)
        if config.model.kind == "memory" and not config.servers.addresses:
            spread_tables(model, config, self.world_size, self.num_hosts)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return SpreadModel(forward=wrapped, without_averaging=wrapped.no_sync)


@dataclass(frozen=True, kw_only=True)
class SpreadModel:
    """A model as it is called in training.

    Args:
        forward: the model, or what wraps it.
        without_averaging: the context of all micro-batches but a step's last.
    """

    forward: Callable[[Tensor], Tensor]
    without_averaging: Callable[[], AbstractContextManager[Any]]


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """Join the ranks that torchrun, or whatever sets the same variables, has started; leave them at the end.

    A process group that is set up already is used, and left as it is.

    Raises:
        ConfigError: the device is not there for each rank, or ranks are not spread evenly over hosts.
    """
    device = choose_device(config.training.device)
    is_set_up = dist.is_initialized()
    if not is_set_up and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    if device.type == "cuda":
        device = _own_gpu()
    if not is_set_up:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.sharding.deadline_s))
    world_size = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    num_hosts = config.sharding.hosts or max(1, world_size // local)
    if world_size % num_hosts:
        raise ConfigError(f"ranks must be spread evenly over hosts; got {world_size} ranks on {num_hosts} hosts")
    try:
        yield World(device=device, rank=dist.get_rank(), world_size=world_size, num_hosts=num_hosts)
    finally:
        if not is_set_up:
            dist.destroy_process_group()


def _own_gpu() -> torch.device:
    local_rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= found:
        raise ConfigError(
            f"each rank needs a GPU of its own; rank {local_rank} of this host finds {found}; "
            f"start at most {found} ranks a host, or use training.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)

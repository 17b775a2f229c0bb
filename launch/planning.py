"""What `mfdist plan` asks and answers, apart from how it is shown: machines, a model, the decision as JSON values."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mfdist.config import RunConfig
from mfdist.errors import ConfigError
from mfdist.models import build_model
from mfdist.models.loads import table_specs
from mfdist.sharding.advice import Advice, advise
from mfdist.sharding.cost import TableCost
from mfdist.sharding.explanation import Explanation, described, explain
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.planner import Decision, decide, judge
from mfdist.sharding.topology import TOPOLOGIES, Topology
from mfdist.sharding.workload import Workload
from mfdist.spec import TableSpec
from mfdist.training.workload import run_workload

#: GPUs that share a host where nobody says.


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines that were asked for; None is the topology's own figure.

    Args:
        topology: a name in `TOPOLOGIES`, or the path of a JSON file.
        world_size, num_hosts: ranks and hosts; without hosts, `ranks_per_host` share one.
        memory_bytes: of a rank.
        host_memory_bytes: of a host.
    """

    topology: str
    world_size: int
    num_hosts: int | None = None
    memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    ranks_per_host: int = 8

    def ranks_on_a_host(self) -> int:
        """Return how many ranks share a host.

        Raises:
            ConfigError: hosts do not divide the ranks.
        """
        if self.num_hosts is None:
            return self.ranks_per_host
        if self.world_size % self.num_hosts:
            raise ConfigError(
                f"each host must have the same number of ranks; got {self.world_size} ranks on {self.num_hosts} hosts"
            )
        return self.world_size // self.num_hosts

    def build(self) -> Topology:
        """Return the topology.

        Raises:
            ConfigError: there is no such topology, or hosts do not divide the ranks.
        """
        num_hosts = self.num_hosts or max(1, self.world_size // self.ranks_per_host)
        if self.topology in TOPOLOGIES:
            found = TOPOLOGIES[self.topology](self.world_size, num_hosts)
        else:
            found = self._read(Path(self.topology))
        changes = {
            "world_size": self.world_size,
            "num_hosts": num_hosts,
            "memory_bytes": self.memory_bytes,
            "host_memory_bytes": self.host_memory_bytes,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(found, **given)  # type: ignore[arg-type]

    def _read(self, path: Path) -> Topology:
        try:
            return Topology.from_json(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            names = ", ".join(TOPOLOGIES)
            raise ConfigError(f"--topology must be {names} or a JSON file; cannot read {path} ({reason})") from None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model's tables and what a step asks of them."""

    name: str
    specs: Sequence[TableSpec]
    workload: Workload

    def answer(self, topology: Topology, plan: ShardingPlan | None = None) -> Decision:
        """Return the planner's decision, or its judgement of a plan written by hand."""
        if plan is None:
            return decide(self.specs, topology, self.workload)
        return judge(plan, self.specs, topology, self.workload)


def ask(config: RunConfig, batch_tokens: int | None) -> Question:
    """Return the question that a run's configuration asks; a vocabulary not given is the tokenizer's to be."""
    shape = config.model
    if shape.kind != "memory":
        raise ConfigError(f'only a MemoryFormer has tables to plan for; got model.kind="{shape.kind}"')
    if not shape.vocab_size:
        shape = shape.model_copy(update={"vocab_size": config.data.vocab_size})
    model = build_model(shape, device="meta")
    return Question(
        name=config.name,
        specs=table_specs(model),
        workload=run_workload(config, model, batch_tokens=batch_tokens),
    )


def describe(question: Question, decision: Decision) -> dict[str, Any]:
    """Return everything about a decision as JSON values; docs/reference/plans.md names the keys."""
    cost = decision.cost
    advice = None if decision.fits else advise(decision)
    return {
        "name": question.name,
        "fits": decision.fits,
        "world_size": decision.plan.world_size,
        "num_hosts": decision.topology.num_hosts,
        "batch_tokens": decision.workload.batch_tokens,
        "step_s": cost.step_s,
        "dense_s": cost.dense_s,
        "usable_bytes": decision.topology.usable_bytes,
        "dense_bytes": int(cost.dense_bytes),
        "buffer_bytes": int(cost.buffer_bytes),
        "rank_bytes": [math.ceil(num_bytes) for num_bytes in cost.rank_bytes],
        "tables": [_table(explanation) for explanation in explain(decision)],
        "advice": None if advice is None else _advice(advice),
    }


def simulate(question: Question, machines: Machines, sizes: Sequence[int], *, is_weak: bool = False) -> list[Decision]:
    """Return the decision at each world size, hosts as full as they can be.

    Args:
        question: its tokens are those of a step at every size, or with `is_weak` at the smallest one.
        machines: what they are.
        sizes: of the world, ascending.
        is_weak: keep the tokens of a rank, so that a step's grow with the ranks.
    """
    found = []
    for size in sizes:
        tokens = question.workload.batch_tokens
        tokens = -(-tokens // sizes[0]) * size if is_weak else tokens
        asked = replace(question, workload=replace(question.workload, batch_tokens=tokens))
        found.append(asked.answer(replace(machines, world_size=size).build()))
    return found


def _table(explanation: Explanation) -> dict[str, Any]:
    cost = explanation.cost
    return {
        "name": cost.plan.name,
        "kind": cost.plan.kind,
        "description": described(cost),
        "reason": explanation.reason,
        "lookup_s": cost.lookup_s,
        "exchange_s": cost.exchange_s,
        "update_s": cost.update_s,
        "host_s": cost.host_s,
        "ranks": _ranks(cost),
        "options": [
            {"description": described(option), "step_s": option.step_s, "rank_bytes": int(option.lasting_bytes)}
            for option in explanation.options
        ],
    }


def _ranks(cost: TableCost) -> list[dict[str, Any]]:
    """Return what ranks hold, need and send, those that hold alike together."""
    kept = cost.footprint
    found = []
    for index, count in enumerate(cost.held.counts):
        sent = {
            phase: int(sum(part.sent[index] for part in cost.transfers if part.phase == phase) * cost.num_micro_batches)
            for phase in ("forward", "backward")
        }
        found.append(
            {
                "num_ranks": int(count),
                "rows": int(cost.held.rows[index]),
                "columns": int(cost.held.columns[index]),
                "weight_bytes": int(kept.weights[index]),
                "gradient_bytes": int(kept.gradients[index]),
                "state_bytes": int(kept.states[index]),
                "saved_bytes": int(kept.saved[index]),
                "buffer_bytes": int(kept.transient[index]),
                "sent_forward_bytes": sent["forward"],
                "sent_backward_bytes": sent["backward"],
            }
        )
    return found


def _advice(advice: Advice) -> dict[str, Any]:
    return {**asdict(advice), "missing_bytes": advice.missing_bytes, "summary": advice.summary()}

"""What a job's parts need of the hosts they will be on, and whether they fit, before anything is started."""

from collections.abc import Sequence
from dataclasses import dataclass

from mfdist import quantities
from mfdist.config import RunConfig
from mfdist.errors import ConfigError
from mfdist.launch.cluster import Host
from mfdist.launch.planning import Machines, Question, ask, describe
from mfdist.launch.start import Fit, trainer_hosts
from mfdist.models import build_model
from mfdist.models.loads import table_loads
from mfdist.parallelize import even_plan
from mfdist.sharding.footprint import state_bytes
from mfdist.sharding.holdings import Holdings
from mfdist.sharding.plan import ShardingPlan


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What is held where.

    Args:
        server_bytes: of rows and their optimiser's states, by server.
        document: of the trainers' plan, as `planning.describe` gives it; None where they hold no tables.
    """

    server_bytes: tuple[int, ...] = ()
    document: dict[str, object] | None = None

    @property
    def largest_server(self) -> int:
        """Return what the fullest server holds."""
        return max(self.server_bytes, default=0)


def plan_job(config: RunConfig, hosts: Sequence[Host], fit: Fit) -> JobPlan:
    """Return how a run's tables lie on a cluster.

    Raises:
        ConfigError: they do not fit; the message says by how much, and what would.
    """
    if config.model.kind != "memory":
        return JobPlan()
    question = ask(config, None)
    if config.launch.servers:
        return _on_servers(config, question, hosts)
    return _on_trainers(config, question, hosts, fit)


def _on_servers(config: RunConfig, question: Question, hosts: Sequence[Host]) -> JobPlan:
    from mfdist.table_server.placement import server_plan

    number = config.launch.servers // config.servers.replicas
    plan = server_plan(
        config.servers.kind,
        question.specs,
        question.workload.loads,
        number,
        needs_whole_rows=config.optimizer.tables.rule == "rowwise_adagrad",
    )
    held = [0.0] * number
    for table in plan.tables:
        holdings = Holdings.of(table, number)
        weights = holdings.rows * holdings.columns * float(table.dtype.itemsize)
        for server, num_bytes in enumerate(holdings.on_ranks(weights + state_bytes(holdings, question.workload))):
            held[server] += float(num_bytes)
    each = [int(num_bytes) for num_bytes in held for _ in range(config.servers.replicas)]
    found = JobPlan(server_bytes=tuple(each))
    most_a_host = number if config.servers.replicas > 1 and len(hosts) > 1 else len(each)  # pairs are kept apart
    room = sum(min(most_a_host, host.memory_bytes // max(1, found.largest_server)) for host in hosts)
    if room < len(each):
        most = quantities.num_bytes(max(host.memory_bytes for host in hosts))
        raise ConfigError(
            f"table servers must fit the hosts' memory; the fullest of {len(each)} needs "
            f"{quantities.num_bytes(found.largest_server)}, hosts have up to {most}; more servers, more hosts, or "
            'model.table_dtype="bf16"'
        )
    return found


def _on_trainers(config: RunConfig, question: Question, hosts: Sequence[Host], fit: Fit) -> JobPlan:
    trainers = config.launch.trainers
    num_hosts = trainer_hosts(config, hosts, fit)
    shape = (num_hosts, trainers // num_hosts) if num_hosts > 1 else (trainers,)
    machines = Machines(
        topology="h100" if fit.gpus else "cpu",
        world_size=trainers,
        num_hosts=num_hosts,
        memory_bytes=None if fit.gpus else min(host.memory_bytes for host in hosts) * num_hosts // trainers,
    )
    decision = question.answer(machines.build(), _given(config, question, shape))
    document = describe(question, decision)
    if not decision.fits:
        advice = document["advice"]
        summary = advice["summary"] if isinstance(advice, dict) else "more trainers, or table servers: --servers N"
        raise ConfigError(f"the tables must fit the trainers' memory; {summary}")
    return JobPlan(document=document)


def _given(config: RunConfig, question: Question, shape: tuple[int, ...]) -> ShardingPlan | None:
    """Return the plan that the configuration itself says, if it does."""
    sharding = config.sharding
    if sharding.plan is not None:
        return ShardingPlan.from_json(sharding.plan.read_text("utf-8"))
    if sharding.kind == "auto" or config.launch.trainers == 1:
        return None
    size = config.model.vocab_size or config.data.vocab_size
    model = build_model(config.model.model_copy(update={"vocab_size": size}), device="meta")
    return even_plan(
        sharding.kind,
        question.specs,
        table_loads(model),
        shape,
        deduplicate=sharding.deduplicate,
        pooled=sharding.pooled,
        forward_dtype=question.workload.lookup_dtype,
        backward_dtype=question.workload.lookup_dtype,
    )

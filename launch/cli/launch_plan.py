"""A job's plan as text, before it is started."""

from collections.abc import Iterator, Sequence

from mfdist import quantities
from mfdist.config import RunConfig
from mfdist.launch.cli import plan_text
from mfdist.launch.cluster import Host
from mfdist.launch.cluster_plan import JobPlan
from mfdist.launch.start import Fit


def lines(config: RunConfig, hosts: Sequence[Host], fit: Fit, plan: JobPlan) -> Iterator[str]:
    """Yield what will run where, and what it needs."""
    launch = config.launch
    each = "a GPU" if fit.gpus else f"{fit.cpus:g} CPU{'s' if fit.cpus != 1 else ''}"
    memory = quantities.num_bytes(sum(host.memory_bytes for host in hosts))
    gpus = sum(host.gpus for host in hosts)
    has_gpus = f", {gpus:g} GPUs" if gpus else ""
    yield (
        f"plan: {len(hosts)} host{'s' if len(hosts) > 1 else ''} with {sum(host.cpus for host in hosts):g} CPUs"
        f"{has_gpus}, {memory} of memory; trainers: {launch.trainers}, each with {each}; "
        f"table servers: {launch.servers}{', in pairs' if launch.servers and config.servers.replicas > 1 else ''}"
    )
    if plan.server_bytes:
        held, most = (quantities.num_bytes(size) for size in (sum(plan.server_bytes), plan.largest_server))
        yield f"plan: rows and their optimiser's states are {held}, {most} on the fullest server"
    if plan.document is not None:
        for line in plan_text.lines(plan.document):
            if not line:
                break
            yield f"plan: {line.strip()}"

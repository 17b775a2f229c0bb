"""`mfdist plan`: say what fits where, how long a step takes and why, before machines are bought."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist import quantities
from mfdist.config import load_config
from mfdist.errors import ConfigError
from mfdist.launch.cli import failures, plan_text
from mfdist.launch.cli.json_output import write_json

if TYPE_CHECKING:
    from mfdist.launch.planning import Machines, Question
    from mfdist.sharding.plan import ShardingPlan


def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A preset or a TOML file, as for train.", show_default=False)
    ],
    world: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ranks: GPUs, or processes.")] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Hosts they are on; by default eight ranks share one.")
    ] = None,
    hbm: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of a rank, such as 80GB.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a host for table servers, such as 1TB.")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens a step, over all ranks; default: the configuration's."),
    ] = None,
    topology: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="h100, cpu, or a JSON file of measured figures.")
    ] = "h100",
    simulated: Annotated[
        str | None,
        typer.Option(
            "--simulate",
            metavar="N,N,…",
            help="Predict these world sizes, such as 8,64; --world and --hosts then say how many ranks share a host.",
        ),
    ] = None,
    is_weak: Annotated[
        bool, typer.Option("--weak", help="With --simulate: keep the tokens of a rank, not those of a step.")
    ] = False,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Check and price this plan instead of choosing one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan to this file, for train.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")] = False,
) -> int:
    """Choose how a model's tables are split over ranks, and say what fits, how long a step takes, and why.

    Example: mfdist plan base --world 8 --hosts 1 --hbm 80GB

    Example: mfdist plan big.toml --simulate 8,64,512,4096 --weak

    Times are predictions from the topology's figures. The exit code is 1 if nothing fits.
    """
    sizes = _sizes(simulated)
    if sizes and (plan_file or out):
        raise ConfigError("--simulate chooses a plan for every world size; leave out --plan and --out")
    if sizes and hosts and not world:
        raise ConfigError(f"with --simulate, --world N --hosts {hosts} say how many ranks share a host; give --world")
    if is_weak and not sizes:
        raise ConfigError("--weak is for growth; give world sizes: --simulate 8,64,512 --weak")
    if not sizes and world is None:
        raise ConfigError(f"give the number of ranks: mfdist plan {shlex.quote(config)} --world 8")
    run = load_config(config, list(settings or ()))
    memory, host = (quantities.parse_bytes(size) if size else None for size in (hbm, host_memory))
    # torch comes with these.
    from mfdist.launch.planning import Machines, ask

    machines = Machines(
        topology=topology,
        world_size=world or sizes[0],
        num_hosts=hosts,
        memory_bytes=memory,
        host_memory_bytes=host,
    )
    question = ask(run, batch_tokens)
    if sizes:
        machines = replace(machines, world_size=sizes[0], num_hosts=None, ranks_per_host=machines.ranks_on_a_host())
        return _simulate(question, machines, sizes, is_weak=is_weak, as_json=as_json)
    return _plan(question, machines, _read(plan_file), out, as_json=as_json)


def _plan(
    question: "Question", machines: "Machines", given: "ShardingPlan | None", out: Path | None, *, as_json: bool
) -> int:
    from mfdist.launch.planning import describe

    decision = question.answer(machines.build(), given)
    document = describe(question, decision)
    if as_json:
        write_json(document)
    else:
        for line in plan_text.lines(document):
            typer.echo(line)
    if not decision.fits:
        return failures.FAILED
    if out is not None:
        out.write_text(decision.plan.to_json(), "utf-8")
    return failures.DONE


def _simulate(question: "Question", machines: "Machines", sizes: list[int], *, is_weak: bool, as_json: bool) -> int:
    from mfdist.launch.planning import describe, simulate

    documents = [describe(question, decision) for decision in simulate(question, machines, sizes, is_weak=is_weak)]
    if as_json:
        write_json({"name": question.name, "scaling": "weak" if is_weak else "strong", "worlds": documents})
    else:
        for line in plan_text.growth(documents):
            typer.echo(line)
    return failures.DONE if all(document["fits"] for document in documents) else failures.FAILED


def _sizes(text: str | None) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f'--simulate takes world sizes, such as 8,64,512; got "{text}"')
    return sorted({int(part) for part in parts})


def _read(path: Path | None) -> "ShardingPlan | None":
    if path is None:
        return None
    from mfdist.sharding.plan import ShardingPlan

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--plan must be a file that mfdist plan --out or a person wrote; {path}: {reason}") from None
    return ShardingPlan.from_json(text)

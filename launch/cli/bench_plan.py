"""`mfdist bench plan`: measure what plans are made from, and whether the planner's choice is the fastest kind."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.plan_choice import Choice
    from mfdist.sharding.topology import Topology

#: How much slower than the fastest kind a choice may be.
_LARGEST_LOSS = 0.15


def bench_plan(
    world: Annotated[str, typer.Option(metavar="N,N,…", help="World sizes: processes of this machine.")] = "2,3,4",
    case: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Cases, such as qkv or n-*.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each kind is timed; the quickest counts.")] = 15,
    is_shared: Annotated[
        bool, typer.Option("--shared", help="Count processor time: other work shares this machine.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda with a GPU each rank, or auto for GPUs where there are several.")
    ] = "auto",
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the last world's figures, for mfdist plan --topology.")
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Measure this machine's links and memory, plan with them, and time every kind of sharding beside the choice.

    Example: mfdist bench plan --world 2,4 --save machine.json

    The exit code is 1 if a choice is more than 15 % slower than the fastest kind.
    """
    sizes = _sizes(world)
    if save is not None and not save.absolute().parent.is_dir():
        raise ConfigError(f"--save must name a file in a folder that is there; got {save}")
    device = _device(device, sizes[-1], is_shared=is_shared)
    from mfdist.benchmarks.plan_choice import chosen_cases, compare
    from mfdist.sharding.topology import Topology

    cases = chosen_cases(device, case or ())
    found: list[Choice] = []
    figures: dict[int, Topology] = {}
    for each in compare(device, sizes, cases, turns=turns, is_shared=is_shared):
        if isinstance(each, Topology):
            figures[each.world_size] = each
            typer.echo(_told(each))
            if save is not None:  # at once, since what follows may be stopped
                save.write_text(each.to_json(), "utf-8")
        else:
            found.append(each)
            typer.echo(_line(each))
    if json_file is not None:
        json_file.write_text(to_json(_document(found, figures, device, is_shared), indent=1) + "\n", "utf-8")
    slow = [f"{choice.case} on {choice.world_size} ranks" for choice in found if choice.loss > _LARGEST_LOSS]
    if slow:
        return failures.fail(
            f"the planner's choice must be within 15 % of the fastest kind; it was not in {', '.join(slow)}"
        )
    return failures.DONE


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise ConfigError(f'--world takes numbers of ranks from 2 on, such as 2,4; got "{text}"')
    return sorted({int(part) for part in parts})


def _device(asked: str, most_ranks: int, *, is_shared: bool) -> str:
    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'--device must be auto, cpu or cuda; got "{asked}"')
    import torch

    num_gpus = torch.cuda.device_count()
    device = asked if asked != "auto" else "cuda" if num_gpus >= most_ranks and not is_shared else "cpu"
    if device == "cuda" and is_shared:
        raise ConfigError("processor time says nothing of a GPU's; got --shared and --device cuda; leave one out")
    if device == "cuda" and most_ranks > num_gpus:
        raise ConfigError(f"each rank needs a GPU of its own; got --world {most_ranks} and {num_gpus} GPUs")
    return device


def _told(topology: "Topology") -> str:
    link = topology.inside
    host = f", {topology.host_lookup_s * 1e3:.2f} ms of the host's a lookup" if topology.host_lookup_s else ""
    return (
        f"{topology.world_size} ranks: link {link.bytes_per_s / 1e9:.2f} GB/s, {link.latency_s * 1e3:.2f} ms a peer, "
        f"{topology.collective_s * 1e3:.2f} ms a collective{host}, "
        f"copy {topology.copy_bytes_per_s / 1e9:.1f} GB/s, lookup {topology.lookup_bytes_per_s / 1e9:.1f} GB/s, "
        f"{topology.cached_lookup_bytes_per_s / 1e9:.1f} in the cache, {topology.row_start_s * 1e9:.0f} ns a row, "
        f"{topology.sort_ids_per_s / 1e6:.0f} M ids/s"
    )


def _line(choice: "Choice") -> str:
    kinds = ", ".join(
        f"{kind} {seconds * 1e3:.1f} ms (predicted {choice.predicted_s[kind] * 1e3:.1f})"
        for kind, seconds in sorted(choice.measured_s.items(), key=lambda item: item[1])
    )
    return f"  {choice.case}: chose {choice.chosen}, {choice.loss:.0%} slower than the fastest; {kinds}"


def _document(found: "list[Choice]", figures: "dict[int, Topology]", device: str, is_shared: bool) -> dict[str, Any]:
    return {
        "machine": machine.cpu(),
        "gpus": machine.gpus() if device == "cuda" else [],
        "versions": machine.versions(),
        "is_shared": is_shared,
        "topologies": [asdict(topology) for topology in figures.values()],
        "results": [{**asdict(choice), "loss": choice.loss} for choice in found],
    }

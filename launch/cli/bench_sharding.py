"""`mfdist bench sharding`: tables spread over real ranks, every kind timed, beside TorchRec where it is installed."""

from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.sharding import ShardingResult


def bench_sharding(
    world: Annotated[
        str, typer.Option(metavar="N,N,…", help="World sizes: processes of this machine, a GPU each on GPUs.")
    ] = "2,4",
    case: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Cases, such as ids or base-*.")] = None,
    contender: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Contenders, such as row_wise or torchrec-*.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="How long each is timed in each case, three turns at least.")
    ] = 3.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for GPUs where there are any.")] = "auto",
    json_file: JsonFile = None,
) -> int:
    """Compare every kind of sharding with an unsharded table, then time it beside TorchRec's.

    Example: mfdist bench sharding --world 2 --case 'ids*' --contender '*row_wise'

    A step is lookup, backward and a plain SGD update. "Forward" and "step" are begun by all ranks together and waited
    for; "in a row", and tokens/s by it, are of steps without a wait between them, as the layers of a model follow each
    other. "Of plain" is the time of one plain all-to-all of as many bytes over that of the step's exchanges, both
    queued behind other work where it is a GPU, and "if idle" both begun at rest. Names that end in "-nccl" leave to
    NCCL what GPUs else write into each other's memory. What is wrong is not timed, and the exit code is 1 then.
    """
    import torch

    from mfdist.benchmarks.sharding import chosen, compare

    num_gpus = torch.cuda.device_count()
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'--device must be auto, cpu or cuda; got "{device}"')
    device = ("cuda" if num_gpus else "cpu") if device == "auto" else device
    sizes = _sizes(world)
    if device == "cuda" and sizes[-1] > num_gpus:
        raise ConfigError(f"each rank needs a GPU of its own; got --world {world} and {num_gpus} GPUs")
    cases, contenders = chosen(device, case or (), contender or ())
    typer.echo(_told(device, contenders))
    typer.echo(_HEADER)
    found: list[ShardingResult] = []
    try:
        for result in compare(device, sizes, cases, contenders, seconds=seconds):
            found.append(result)
            typer.echo(_line(result, found))
    finally:  # what was found before an end that came early is kept
        if json_file is not None:
            json_file.write_text(to_json(_document(found), indent=1) + "\n", "utf-8")
    wrong = [f"{result.contender} in {result.case} on {result.world_size} ranks" for result in found if result.is_wrong]
    if wrong:
        return failures.fail(f"every result must be an unsharded table's; wrong were {', '.join(wrong)}")
    return failures.DONE


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f'--world takes numbers of ranks, such as 2,4; got "{text}"')
    return sorted({int(part) for part in parts})


def _told(device: str, contenders: list[str]) -> str:
    cpu, gpus = machine.cpu(), machine.gpus()
    told = gpus[0]["name"] if device == "cuda" else f"{cpu['name']}, {cpu['usable_cores']} cores, one thread a rank"
    if any(name.startswith("torchrec") for name in contenders) and find_spec("torchrec") is None:
        told += "; TorchRec is not installed, so that nothing is compared with it"
    return told


_HEADER = (
    f"{'ranks':<6}{'case':<15}{'contender':<22}{'forward':>11}{'step':>11}{'in a row':>11}{'tokens/s':>10}{'sent':>11}"
    f"{'of plain':>9}{'if idle':>8}{'error':>9}  remarks"
)


def _line(result: "ShardingResult", found: "list[ShardingResult]") -> str:
    line = f"{result.world_size:<6}{result.case:<15}{result.contender:<22}"
    times = (result.forward_s, result.step_s, result.in_a_row_s)
    if result.tokens_per_s is None or None in times:
        return f"{line}{result.note}"
    line += "".join(f"{(each or 0.0) * 1e3:>8.2f} ms" for each in times) + f"{result.tokens_per_s:>10.0f}"
    line += f"{'-':>11}" if result.sent_bytes is None else f"{result.sent_bytes / 1e6:>8.2f} MB"
    line += f"{'-':>9}" if result.share_of_plain is None else f"{result.share_of_plain:>9.2f}"
    line += f"{'-':>8}" if result.share_if_idle is None else f"{result.share_if_idle:>8.2f}"
    line += f"{'-':>9}" if result.error is None else f"{result.error:>9.1e}"
    remarks = []
    if result.overlap is not None:
        remarks.append(f"{result.overlap:.0%} overlapped")
    if result.peak_bytes is not None:
        remarks.append(f"peak {result.peak_bytes / 1e9:.2f} GB")
    if (own := _own(result, found)) is not None:
        remarks.append(f"{(result.step_s or 0.0) / own:.2f} × ours")
    return f"{line}  {', '.join(remarks)}".rstrip()


def _own(result: "ShardingResult", found: "list[ShardingResult]") -> float | None:
    """Return the step of our kind that does the same as a contender that is not ours; TorchRec pools its rows."""
    kind = result.contender.removeprefix("torchrec-")
    if kind == result.contender:
        return None
    kind = "row_wise-pooled" if kind == "row_wise" else kind
    same = (one for one in found if (one.world_size, one.case, one.contender) == (result.world_size, result.case, kind))
    return next((one.step_s for one in same), None)


def _document(found: "list[ShardingResult]") -> dict[str, Any]:
    from mfdist.benchmarks.sharding import DERIVED

    return {
        "machine": {"cpu": machine.cpu(), "gpus": machine.gpus()},
        "versions": machine.versions(),
        "results": [{**asdict(result), **{name: getattr(result, name) for name in DERIVED}} for result in found],
    }

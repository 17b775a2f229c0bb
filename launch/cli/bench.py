"""`mfdist bench`: measure mfdist on this machine, beside what a user would call instead."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.launch import machine
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import JsonFile, to_json

if TYPE_CHECKING:
    from mfdist.benchmarks.ceilings import Ceilings
    from mfdist.benchmarks.contender import Result

app = typer.Typer(
    help="Measure mfdist on this machine.\n\nExample: mfdist bench layers --threads 1", no_args_is_help=True
)

_DEFAULT_SECONDS = {"cpu": 1.0, "cuda": 0.2}
_DEFAULT_REPEATS = {"cpu": 3, "cuda": 100}


@app.callback()
def _group() -> None:
    """Keep `bench` a group of verbs, though it has one."""


@app.command()
def kernels(
    case: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Cases, such as base-qkv or pkm*.")] = None,
    op: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Operations, such as gather_sum.")] = None,
    impl: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Implementations, such as mfdist or torch-bf16.")
    ] = None,
    json_file: JsonFile = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads, all by default; with 1, times are processor time, right on a busy CPU."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Time spent on each contender; 1 on a CPU, 0.2 on a GPU by default.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=0, help="Calls that must repeat bit for bit; 3 on a CPU, 100 on a GPU by default."),
    ] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Compare with float64 and time nothing.")] = False,
) -> int:
    """Compare each kernel with float64, then time it beside torch's, and FBGEMM's where that is installed.

    Example: mfdist bench kernels --case 'base-*' --op gather_sum

    Example: mfdist bench kernels --json kernels.json

    PATTERN is a shell pattern; an option may be given several times. What is wrong is not timed, and the exit code is 1
    then. Rates count the bytes an operation would move if no cache held any, so small tables exceed the memory's own.
    """
    import torch

    from mfdist.benchmarks import ceilings
    from mfdist.benchmarks.kernels import Selection, measure

    device = chosen_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    seconds = _DEFAULT_SECONDS[device] if seconds is None else seconds
    repeats = _DEFAULT_REPEATS[device] if repeats is None else repeats
    selection = Selection(ops=tuple(op or ()), cases=tuple(case or ()), impls=tuple(impl or ()))
    selection.check(device)
    memory = ceilings.measure(device, max(seconds, _DEFAULT_SECONDS[device]))
    facts = _machine(device)
    typer.echo(
        f"{facts['name']}, torch {torch.__version__}, {quantities.threads(facts['threads'])}; memory: {_told(memory)}"
    )
    typer.echo(_HEADER)
    found: list[Result] = []
    try:
        for result in measure(device, memory, selection, seconds=0.0 if check_only else seconds, repeats=repeats):
            found.append(result)
            typer.echo(_line(result))
    finally:  # what was found before an end that came early is kept
        if json_file is not None:
            json_file.write_text(to_json(_document(facts, memory, found), indent=1) + "\n", "utf-8")
    wrong = [f"{result.op} {result.case} {result.impl}" for result in found if result.is_wrong]
    if wrong:
        return failures.fail(f"every result must be right; wrong were {', '.join(wrong)}")
    return failures.DONE


def chosen_device(asked: str) -> str:
    """Return "cpu" or "cuda"; auto takes a GPU where there is one."""
    import torch

    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'--device must be auto, cpu or cuda; got "{asked}"')
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda needs a GPU; torch {torch.__version__} finds none; see mfdist doctor")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _machine(device: str) -> dict[str, Any]:
    import torch

    cpu, gpus = machine.cpu(), machine.gpus()
    name = gpus[0]["name"] if device == "cuda" else cpu["name"]
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "cpu": cpu, "gpus": gpus}


def _document(facts: dict[str, Any], memory: "Ceilings", found: list["Result"]) -> dict[str, Any]:
    return {
        "machine": facts,
        "versions": machine.versions(),
        "ceilings": asdict(memory),
        "results": [asdict(result) for result in found],
    }


def _told(memory: "Ceilings") -> str:
    return f"copy {memory.copy_bytes_per_s / 1e9:.0f} GB/s, read {memory.read_bytes_per_s / 1e9:.0f} GB/s"


_HEADER = (
    f"{'op':<19}{'case':<16}{'impl':<13}{'median':>11}{'spread':>8}{'GB/s':>9}{'of ceiling':>11}{'error':>9}  remarks"
)


def _line(result: "Result") -> str:
    line = f"{result.op:<19}{result.case:<16}{result.impl:<13}"
    if result.median_us is not None and result.bytes_per_s is not None and result.share_of_ceiling is not None:
        line += f"{result.median_us:>8.1f} µs{result.spread or 0:>8.1%}"
        line += f"{result.bytes_per_s / 1e9:>9.0f}{result.share_of_ceiling:>11.2f}"
    else:
        line += f"{'-':>11}{'-':>8}{'-':>9}{'-':>11}"
    line += f"{result.error:>9.1e}" if result.error is not None else f"{'-':>9}"
    remarks = [result.note] if result.note else []
    if result.is_wrong:
        remarks.insert(0, f"WRONG, at most {result.tolerance:.0e}")
    if result.repeats:
        remarks.append(f"same bits {result.repeats + 1} times")
    if result.extra_bytes is not None:
        remarks.append(f"{result.extra_bytes / 1e6:.1f} MB extra")
    return (f"{line}  {'; '.join(remarks)}").rstrip()

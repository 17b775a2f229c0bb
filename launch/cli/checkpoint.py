"""`mfdist checkpoint`: list, inspect, verify, compare and prune the committed steps of a run."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mfdist import quantities
from mfdist.errors import CheckpointError
from mfdist.launch.cli import failures
from mfdist.launch.cli.checkpoint_path import AsJson, StepPath, find_step, find_steps
from mfdist.launch.cli.display import showing
from mfdist.launch.cli.json_output import write_json
from mfdist.launch.cli.progress import RunProgress
from mfdist.training.events import Preparing, ignore

if TYPE_CHECKING:
    from mfdist.checkpoint.comparison import Difference
    from mfdist.checkpoint.directory import CheckpointDirectory
    from mfdist.checkpoint.step_files import StepFiles
    from mfdist.checkpoint.step_info import StepInfo

app = typer.Typer(
    help="List, verify, compare, prune and convert the checkpoints of a run.\n\n"
    "Example: mfdist checkpoint list runs/demo",
    no_args_is_help=False,
)


@app.command("list")
def list_steps(path: StepPath, as_json: AsJson = False) -> None:
    """List the committed steps of a run, oldest first.

    Example: mfdist checkpoint list runs/demo
    """
    _, steps = find_steps(path)
    if as_json:
        write_json({"path": str(path), "checkpoints": [described(info) for info in steps]})
        return
    for info in steps:
        size = "DAMAGED" if info.damage else quantities.num_bytes(info.num_bytes)
        typer.echo(f"step {info.step:>9,}  {size:>9}  {info.created:<20}  {info.path}")
    if not steps:
        typer.echo(f"nothing is committed yet in {path}")


@app.command()
def inspect(path: StepPath, as_json: AsJson = False) -> None:
    """Show what a step holds, by default the last: every array's shape, dtype and size, and the run's attributes.

    Example: mfdist checkpoint inspect runs/demo
    """
    info = find_step(path)
    with _open(info) as files:
        arrays = [_array(files, name) for name in files.manifest.arrays]
        attributes = files.attributes()
    if as_json:
        write_json({**described(info), "arrays": arrays, "attributes": attributes})
        return
    typer.echo(
        f"step {info.step}: {quantities.num_bytes(info.num_bytes)} in {info.num_files} files, of which this save wrote "
        f"{quantities.num_bytes(info.written_bytes)}; {info.created}"
    )
    width = max((len(array["path"]) for array in arrays), default=0)
    for array in arrays:
        shape = " × ".join(map(str, array["shape"])) or "one number"
        size = quantities.num_bytes(array["num_bytes"])
        files_of_it = "1 file" if array["num_files"] == 1 else f"{array['num_files']} files"
        typer.echo(f"  {array['path']:<{width}}  {array['dtype']:<9} {shape:<16} {size:>9} in {files_of_it}")
    for key, value in attributes.items():
        typer.echo(f"  {key}: {value if isinstance(value, dict) else str(value).splitlines()[0] + ' …'}")


@app.command()
def verify(path: StepPath, as_json: AsJson = False) -> int:
    """Read every byte of a run's steps, or of one of them, and compare it with what was written.

    Example: mfdist checkpoint verify runs/demo

    Example: mfdist checkpoint verify runs/demo/checkpoints/step-000000400

    The exit code is 1 if anything is damaged; the other steps can still be used.
    """
    directory, steps = find_steps(path)
    if not steps:
        raise CheckpointError(f"there must be a committed step to verify; {path} has none")
    found: list[dict[str, Any]] = []
    for info in steps:
        try:
            damages = _verify(directory, info)
        except CheckpointError:
            if any(found.step == info.step for found in directory.steps()):
                raise
            continue  # a run that goes on has pruned it meanwhile
        found.append({**described(info), "ok": not damages, "damages": damages})
        if not as_json:
            _show(info, damages)
    is_whole = all(step["ok"] for step in found)
    if as_json:
        write_json({"path": str(path), "ok": is_whole, "checkpoints": found})
    return failures.DONE if is_whole else failures.FAILED


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="PATH", help="A run (its last step), or a step.")],
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Tell which arrays and attributes of two steps differ, and how much of them; mostly without reading values.

    Example: mfdist checkpoint diff runs/demo/checkpoints/step-000000200 runs/demo/checkpoints/step-000000400
    """
    from mfdist.checkpoint.comparison import compare_attributes, compare_steps

    infos = find_step(first), find_step(second)
    with _open(infos[0]) as one, _open(infos[1]) as other:
        arrays = compare_steps(one, other)
        attributes = compare_attributes(one.attributes(), other.attributes())
    if as_json:
        write_json(
            {
                "first": described(infos[0]),
                "second": described(infos[1]),
                "is_same": not arrays and not attributes,
                "arrays": [asdict(difference) for difference in arrays],
                "attributes": {key: list(values) for key, values in attributes.items()},
            }
        )
        return
    for difference in arrays:
        typer.echo(_line(difference))
    for key, values in attributes.items():
        typer.echo(f"attribute {key}: {_short(values[0])} and {_short(values[1])}")
    if not arrays and not attributes:
        typer.echo("the two hold the same")


@app.command()
def prune(
    path: StepPath,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the latest steps stay.", show_default=False)],
    keep_every: Annotated[int, typer.Option(min=0, help="Steps that this divides stay too; 0: no others.")] = 0,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old steps of a run. What a kept step shares with a deleted one stays.

    Example: mfdist checkpoint prune runs/demo --keep-last 3 --keep-every 1000

    Run verify first. A step whose files are missing or cut short does not count as one of the latest; that others are
    damaged shows only when every byte is read.
    """
    directory, steps = find_steps(path, is_run=True)
    numbers = [info.step for info in steps]
    outdated = (directory.outdated if is_dry_run else directory.prune)(keep_last, keep_every)
    kept = [number for number in numbers if number not in outdated]
    if as_json:
        write_json({"path": str(path), "is_dry_run": is_dry_run, "deleted": outdated, "kept": kept})
        return
    verb = "would delete" if is_dry_run else "deleted"
    typer.echo(f"{verb} {len(outdated)} of {len(numbers)} steps; kept: {', '.join(map(str, kept)) or 'none'}")


def described(info: "StepInfo") -> dict[str, Any]:
    """Return a step as the JSON documents have it."""
    return {**asdict(info), "path": str(info.path)}


def _verify(directory: "CheckpointDirectory", info: "StepInfo") -> list[str]:
    def tell(done: int, total: int) -> None:
        observer(Preparing(activity=f"verifying step {info.step}", done=done, total=total, unit="bytes"))

    # A large step takes minutes: who looks on sees it move, a log need not.
    watched = showing(sys.stderr, RunProgress()) if sys.stderr.isatty() else contextlib.nullcontext(ignore)
    with watched as observer:
        return [str(damage) for damage in directory.verify(info.step, tell)]


@contextlib.contextmanager
def _open(info: "StepInfo") -> Iterator["StepFiles"]:
    from mfdist.checkpoint.step_files import StepFiles

    with StepFiles(info.path) as files:
        yield files


def _array(files: "StepFiles", path: str) -> dict[str, Any]:
    from mfdist.checkpoint.dtypes import dtype_name
    from mfdist.checkpoint.layout import parse_path

    array = files.array(path)
    table, name = parse_path(path)
    sizes = [
        files.manifest.files[place.file].num_bytes for place in array.places() if place.file in files.manifest.files
    ]
    return {
        "path": path,
        "table": table,
        "array": name,
        "shape": list(array.grid.shape),
        "dtype": dtype_name(array.dtype),
        "rows_per_file": array.grid.rows_per_file,
        "columns_per_file": array.grid.columns_per_file,
        "num_files": len(sizes),
        "num_bytes": sum(sizes),
    }


def _show(info: "StepInfo", damages: list[str]) -> None:
    typer.echo(f"step {info.step}: {'DAMAGED' if damages else 'whole'} ({quantities.num_bytes(info.num_bytes)})")
    for damage in damages:
        typer.echo(f"  {damage}")


def _line(difference: "Difference") -> str:
    what = f"table {difference.table} {difference.array}" if difference.table else f"tensor {difference.array}"
    if difference.kind != "values" or difference.rows is None:
        return f"{what}: {difference.kind}"
    share = difference.changed_bytes / max(1, difference.num_bytes)
    begin, end = difference.rows
    return f"{what}: {share:.1%} of its files, rows {begin} to {end - 1}"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"

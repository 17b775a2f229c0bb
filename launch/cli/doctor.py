"""`mfdist doctor`: say whether this machine can do the work, and what to do where it cannot."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from mfdist import quantities
from mfdist.launch import checkup, machine
from mfdist.launch.check import Check
from mfdist.launch.cli import failures
from mfdist.launch.cli.json_output import write_json


def doctor(
    at: Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs will be written.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document on stdout.")] = False,
) -> int:
    """Check whether this machine can train, and say what to do where it cannot.

    Example: mfdist doctor --json

    The exit code is 1 if something essential fails.
    """
    from mfdist.training.data.cache import default_cache_dir

    folder, cache = at.absolute(), default_cache_dir()
    # On stderr when stdout holds the document, so that a person waiting for the kernels to compile sees it move.
    console = Console(highlight=False, stderr=as_json)
    found = []
    for check in checkup.checks(folder, cache):
        found.append(check)
        _show(console, check)
    ok = all(check.ok for check in found if check.is_essential)
    facts = machine.describe(folder, cache)
    if as_json:
        checks = [asdict(check) for check in found]
        write_json({"ok": ok, "checks": checks, "versions": machine.versions(), "machine": facts})
    else:
        _show_facts(console, facts)
    return failures.DONE if ok else failures.FAILED


def _show(console: Console, check: Check) -> None:
    mark, style = (
        ("ok", "green") if check.ok else ("FAILED", "bold red") if check.is_essential else ("warning", "yellow")
    )
    console.print(Text.assemble((f"{mark:<8}", style), f"{check.name}: {check.detail}"), soft_wrap=True)
    if not check.ok:
        console.print(Text(f"        {check.remedy}"), soft_wrap=True)


def _show_facts(console: Console, facts: dict[str, object]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items() if version is not None)
    cpu = machine.cpu()
    memory = quantities.num_bytes(machine.memory()["total_bytes"] or 0)
    console.print(
        Text(f"machine: {facts['system']}; {cpu['name']}, {cpu['usable_cores']} cores, {memory}"), soft_wrap=True
    )
    console.print(Text(f"vectors: {' '.join(cpu['flags'])}"), soft_wrap=True)
    console.print(Text(f"versions: {versions}"), soft_wrap=True)

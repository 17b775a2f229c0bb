"""What the documents tell a reader to type: code that runs, configurations that load, commands that exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mfdist.config import parse_config
from mfdist.errors import ConfigError
from mfdist.launch.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_ELSEWHERE = ("checkpoint-layout.md", "protocol.md")  # by tests/checkpoint and tests/table_server


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Return (page, text) of every fenced block in one of `languages`."""
    return [
        (page.name, text)
        for page in PAGES
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        if language in languages and not (language == "python" and page.name in RUN_ELSEWHERE)
    ]


@pytest.mark.slow  # four minutes on two cores
@pytest.mark.timeout(1800)
def test_the_tutorial_runs_from_its_first_command_to_its_last(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial" / "one-to-many.md").read_text("utf-8")
    script = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + "".join(
        re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    )
    assert script.count("mfdist") > 8
    environment = _environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-m", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (_losses(tmp_path / "runs" / run / "metrics.jsonl") for run in ("one", "two"))
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    assert one[40] == pytest.approx(two[40], rel=1e-2)  # as the page says


def _losses(metrics: Path) -> dict[int, float]:
    events = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "stepped"}


def typed_lines(command: str) -> list[str]:
    """Return the arguments of every line that runs `command`, comments cut off."""
    lines = [line for _, text in blocks("", "sh", "bash", "console", "text") for line in text.splitlines()]
    inline = [code for page in PAGES for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))]
    pattern = re.compile(rf"(?:\$ )?(?:\.venv/bin/)?{command} (.+)")
    return [match[1] for line in (*lines, *inline) if (match := pattern.fullmatch(line.strip()))]


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_runs(page: str, code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_a_whole_configuration_loads(page: str, text: str) -> None:
    assert parse_config(text, origin=page).training.steps > 0


def test_the_message_that_is_shown_for_a_misspelt_key_is_the_one_that_comes() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text("utf-8")
    configuration, shown = re.findall(r"^```(?:toml|text)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[:2]
    with pytest.raises(ConfigError) as caught:
        parse_config(configuration + "num_heads = 4\n", origin="my.toml")
    assert " ".join(shown.split()) == str(caught.value)


def test_commands_exist_with_their_options() -> None:
    lines = [shlex.split(line, comments=True) for line in typed_lines("mfdist")]
    assert len(lines) > 5
    for line in lines:
        verb, arguments = typer.main.get_command(app), [*line]
        while arguments and arguments[0] in getattr(verb, "commands", {}):
            verb = verb.commands[arguments.pop(0)]
        options = {name for parameter in verb.params for name in parameter.opts} | {"--help"}
        unknown = {word for word in arguments if word.startswith("--")} - options
        assert not unknown, f"mfdist {' '.join(line)}: no such option: {unknown}"
        assert not hasattr(verb, "commands") or not arguments or arguments[0].startswith("-"), f"no such verb: {line}"


def test_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    lines = typed_lines("make")
    assert len(lines) > 3
    for line in lines:
        words = re.split(r"  +|#", line)[0].split()
        targets = {word for word in words if "=" not in word and not word.startswith("-")}
        assert targets <= phony, f"make {line}: no such target"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"\S+\.md", navigation))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES if (ROOT / "docs") in page.parents}

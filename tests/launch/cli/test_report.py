"""`mfdist report` on a real run: the page, the document, and the live page of a process of its own."""

import json
import re
import shutil
import signal
import subprocess
import urllib.request

import pytest

from tests.launch.cli.conftest import COMMAND, DEADLINE_S, environment


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to write in."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_page_is_written_into_the_run_or_where_it_is_asked_for(mfdist, run, tmp_path):
    code, out, err = mfdist("report", run)
    assert (code, out) == (0, f"{run / 'report.html'}\n"), err
    html = (run / "report.html").read_text()
    assert "A MemoryFormer with " in html and 'id="plot-hits"' in html and "finished" in html
    code, out, _ = mfdist("report", run, "--against", run, "--out", tmp_path / "both.html")
    assert (code, out) == (0, f"{tmp_path / 'both.html'}\n")
    assert "run (1)" in (tmp_path / "both.html").read_text()
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".html"]


def test_the_document_says_what_the_run_said(mfdist, run, finished):
    code, out, err = mfdist("report", run, "--json")
    assert code == 0, err
    document, summary = json.loads(out), finished[1]
    story = document["runs"][0]
    assert document["version"] == 1 and document["summary"][0].startswith("A MemoryFormer")
    assert story["evaluations"][-1]["bits_per_byte"] == summary["validation"]["bits_per_byte"]
    assert story["steps"]["curves"]["loss"]["mean"][-1] == pytest.approx(summary["loss"], rel=1e-4)
    assert story["state"]["kind"] == "finished" and story["step"] == 12
    assert [save["is_there"] for save in story["checkpoints"]] == [False, True, True]  # keep_last = 2
    assert {layer["name"] for layer in story["tables"]["detail"]["layers"]} == {
        "blocks.0.qkv",
        "blocks.0.ffn1",
        "blocks.0.ffn2",
    }
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--serve"], "--json writes the document instead of a page"),
        (["--serve", "--out", "x.html"], "--serve serves the page instead of writing it"),
        (["--port", "8000"], "--port goes with --serve"),
    ],
)
def test_what_does_not_go_together_is_refused(mfdist, run, arguments, message):
    code, out, err = mfdist("report", run, *arguments)
    assert (code, out) == (2, "") and message in err


def test_a_folder_without_a_run_is_named(mfdist, tmp_path):
    code, _, err = mfdist("report", tmp_path)
    assert code == 2 and "it has no config.toml" in err


def test_the_live_page_says_its_address_first_and_ends_with_ctrl_c(run, workplace):
    process = subprocess.Popen(
        [*COMMAND, "report", str(run), "--serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(workplace / "cache"),
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # heard also where the tests run behind a shell
    )
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), process.stderr.read()
        with urllib.request.urlopen(address, timeout=DEADLINE_S) as answer:
            assert "data-live-every" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.communicate()

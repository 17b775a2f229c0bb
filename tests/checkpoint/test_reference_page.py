"""The page for readers without mfdist tells the truth: its program runs, and its manifest rules hold."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import xxhash

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "checkpoint-layout.md"
State = Callable[..., CheckpointState]


def test_the_program_on_the_page_reads_a_checkpoint(
    directory: CheckpointDirectory, small_state: State, tmp_path: Path
) -> None:
    state = small_state(12)
    [program] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "mfdist" not in program
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, directory.save(state).path],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=tmp_path,
    )
    header, *lines = process.stdout.splitlines()
    assert header == f"step 12 {state.attributes}"
    weight = state.tables["blocks.0.qkv"].weight
    path, dtype, *_, total = lines[0].split()
    assert (path, dtype) == ("tables/blocks.0.qkv/weight", "bfloat16")
    assert abs(float(total) - float(weight.double().abs().sum())) < 0.01
    assert len(lines) == 7


def test_the_manifest_can_be_checked_as_the_page_says(directory: CheckpointDirectory, small_state: State) -> None:
    path = directory.save(small_state()).path
    attributes = json.loads((path / "manifest" / "zarr.json").read_text())["attributes"]
    [table] = re.findall(r"\| attribute \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    named = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name.strip(" `") for cell in named for name in cell.split(",")} == set(attributes)
    crc = attributes.pop("crc32c")
    assert crc == f"{google_crc32c.value(json.dumps(attributes, sort_keys=True, indent=1).encode()):08x}"
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    del files["manifest/zarr.json"]
    assert {name: entry[:2] for name, entry in attributes["files"].items()} == {
        name: [file.stat().st_size, f"{google_crc32c.value(file.read_bytes()):08x}"] for name, file in files.items()
    }
    for name, (_, _, *digest) in attributes["files"].items():
        if name.endswith("zarr.json"):
            assert digest == []
        else:  # these are small: one chunk a file, so no index
            assert digest == [xxhash.xxh3_128_hexdigest(files[name].read_bytes())]

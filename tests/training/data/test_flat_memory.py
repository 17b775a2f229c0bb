"""Memory stays flat, whatever the length of a line: each case runs in a process of its own, whose peak is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

MIB = 2**20

READ = """
import json, resource, sys
from mfdist.training.data.documents import open_source
skipped = []
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source = open_source(sys.argv[1])
before = peak()
num_chars = sum(len(document.text) for document in source.documents(on_skip=skipped.append))
print(json.dumps([num_chars, skipped, peak() - before]))
"""

PREPARE = """
import json, resource, sys
from pathlib import Path
from mfdist.config import DataConfig
from mfdist.training.data.token_store import prepare_tokens
from mfdist.training.data.ngram import baselines
from mfdist.training.events import ignore
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def prepare(source):
    store = prepare_tokens(DataConfig(source=source, tokenizer="bytes", cache_dir=sys.argv[3]), observer=ignore)
    baselines(store)
    return len(store.train) + len(store.validation)
prepare(sys.argv[1])
before = peak()
num_tokens = prepare(sys.argv[2])
# Pages of the mapped token files count as resident while they are cached; they are not held.
print(json.dumps([num_tokens, [], peak() - before]))
"""


def measure(program: str, *arguments: Path) -> tuple[int, list[str], int]:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=280, check=True
    )
    num, skipped, grown = json.loads(done.stdout)
    return num, skipped, grown


def write_line(path: Path, num_mib: int) -> None:
    with path.open("wb") as file:
        file.write(b'{"text": "' if path.suffix == ".jsonl" else b"")
        for _ in range(num_mib):
            file.write(b"one line " * (MIB // 9) + b"!" * (MIB % 9))
        file.write(b'"}\n{"text": "short"}\n' if path.suffix == ".jsonl" else b"")


SIZES = [pytest.param(64), pytest.param(1024, marks=[pytest.mark.large, pytest.mark.slow])]


@pytest.mark.parametrize("num_mib", SIZES)
def test_a_text_file_of_one_line(tmp_path: Path, num_mib: int) -> None:
    write_line(tmp_path / "a.txt", num_mib)
    num_chars, skipped, grown = measure(READ, tmp_path)
    assert num_chars == num_mib * MIB
    assert skipped == []
    assert grown < 24 * MIB


@pytest.mark.parametrize("num_mib", SIZES)
def test_a_jsonl_file_of_one_line(tmp_path: Path, num_mib: int) -> None:
    write_line(tmp_path / "a.jsonl", num_mib)
    num_chars, skipped, grown = measure(READ, tmp_path)
    assert num_chars == len("short")
    assert len(skipped) == 1
    assert "a.jsonl line 1" in skipped[0]
    assert grown < 60 * MIB  # a line of 16 MiB is held, and joined from what was read


@pytest.mark.parametrize("num_mib", SIZES)
def test_a_small_file_that_unpacks_to_a_long_line(tmp_path: Path, num_mib: int) -> None:
    with (tmp_path / "a.txt.zst").open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
        for _ in range(num_mib):
            file.write(b"x" * MIB)
    assert (tmp_path / "a.txt.zst").stat().st_size < MIB
    num_chars, skipped, grown = measure(READ, tmp_path)
    assert num_chars == num_mib * MIB
    assert skipped == []
    assert grown < 120 * MIB  # 1 KiB of zstd may unpack to 32 MiB, which is held twice


@pytest.mark.parametrize("num_mib", SIZES)
def test_preparing_a_file_of_one_line(tmp_path: Path, num_mib: int) -> None:
    for size in (8, num_mib):
        (tmp_path / str(size)).mkdir()
        write_line(tmp_path / str(size) / "a.txt", size)
    num_tokens, _, grown = measure(PREPARE, tmp_path / "8", tmp_path / str(num_mib), tmp_path / "cache")
    assert num_tokens == num_mib * MIB + 1
    assert grown < 64 * MIB + 2 * num_tokens

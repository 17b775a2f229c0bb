"""Triton's interpreter, whose parts take a processor each: those of all selected tests run side by side."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TEST = "test_in_the_interpreter"
_LONGEST_S = 250

Interpret = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def interpret(request: pytest.FixtureRequest) -> Iterator[Interpret]:
    """Return what runs a part of a module here in the interpreter; the first test that asks begins those of all."""
    pytest.importorskip("triton", reason="Triton is not installed")
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.originalname == _TEST]
    parts = [(item.module.INTERPRETED, item.callspec.params["part"]) for item in items]
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # each of which knows of all tests, and makes some
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun = {} if is_worker else {part: pool.submit(_interpreted, *part) for part in parts}

        def result(module: str, part: str) -> "subprocess.CompletedProcess[str]":
            return begun[module, part].result() if begun else _interpreted(module, part)

        yield result
        pool.shutdown(cancel_futures=True)


def _interpreted(module: str, part: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", part],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=_LONGEST_S,
    )

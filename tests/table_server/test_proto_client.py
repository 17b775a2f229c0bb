"""The client in the protocol's page: no code of the library, and rows all the same."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.table_server.processes import server
from tests.table_server.raw_client import RawClient

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "protocol.md"


def test_the_client_of_the_page_needs_reflection_alone(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert "mfdist." not in code.replace("mfdist.table.v1.TableService", "")
    with server(tmp_path / "server") as process:
        client = RawClient(process.address)
        client.create("a")
        rows = client.rows("a")
        client.channel.close()
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, process.address, "a"], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert [float(each) for each in done.stdout.split()] == pytest.approx(
        (rows[0] + np.float32(0.5) * rows[5]).tolist(), rel=1e-6
    )

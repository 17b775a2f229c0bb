"""The client in the protocol's page: no code of the library, and rows all the same."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.processes import server
from tests.table_server.raw_client import RawClient, array, tensor

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


def test_a_lookup_that_says_so_is_answered_after_one_message(tmp_path: Path) -> None:
    lookups = pb.Lookups(row_ids=tensor(np.array([[3, 9]])), scores=tensor(np.array([[2.0, 0.5]], np.float32)))
    with server(tmp_path / "server") as process:
        client = RawClient(process.address)
        client.create("a")
        rows = client.rows("a")

        def sums(number: int, **metadata: str) -> list[np.ndarray[Any, Any]]:
            requests = [pb.LookupRequest(table="a", lookups=lookups)] * number
            said = [(key.replace("_", "-"), value) for key, value in metadata.items()]
            return [array(reply.sums) for reply in client.stub.Lookup(iter(requests), timeout=60, metadata=said)]

        assert len(sums(2)) == len(sums(2, mfdist_once="0")) == 2
        (found,) = sums(2, mfdist_once="1")
        np.testing.assert_allclose(found[0], 2 * rows[3] + 0.5 * rows[9], rtol=1e-6)
        np.testing.assert_array_equal(found, sums(1)[0])
        with pytest.raises(grpc.RpcError, match="must be made before it is used") as refused:
            next(client.stub.Lookup(iter([pb.LookupRequest(table="b")]), timeout=60, metadata=[("mfdist-once", "1")]))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
        client.channel.close()

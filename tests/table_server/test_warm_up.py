"""Kernels are there before the event loop calls them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from mfdist.table_server.proto import table_v1_pb2 as pb
from tests.table_server.raw_client import RawClient, tensor

_SCRIPT = """
import sys, torch
from numba.core.dispatcher import Dispatcher
from mfdist.checkpoint.state import TableState
from mfdist.kernels.gather_sum import cpu_impl
from mfdist.optim import RowSGD
from mfdist.spec import TableSpec
from mfdist.table_server.messages import ShardSpec
from mfdist.table_server.shard import Lookups, Shard
from mfdist.table_server.warm_up import WarmUp

torch.set_num_threads(2)
dtype = getattr(torch, sys.argv[1])
def shard(num_rows):
    spec = TableSpec(name="a", num_rows=num_rows, row_dim=48, dtype=dtype)
    made = ShardSpec(table=spec, region=spec.region, optimizer=RowSGD(lr=0.1), std=1.0, seed=0)
    return Shard(made, TableState(weight=torch.zeros(num_rows, 48, dtype=dtype)))
def num_loaded():
    return sum(len(kernel.overloads) for kernel in vars(cpu_impl).values() if isinstance(kernel, Dispatcher))
assert num_loaded() == 0
warm_up, shards = WarmUp(), [shard(64), shard(1 << 18)]
for one in shards:
    warm_up.begin(one).result(540)
before = num_loaded()
assert before > 0
for one in shards:
    for num_tokens in (0, 1, 2, 65, 300):
        for num_lookups, stride in ((1, 0), (7, 0), (512, 0), (len(one.rows) // 16, 16)):
            codes = torch.zeros(num_tokens, num_lookups, dtype=torch.int32)
            one.lookup(Lookups(codes, torch.ones(num_tokens, num_lookups), code_stride=stride))
assert num_loaded() == before, (num_loaded(), before)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_lookup_needs_a_kernel_that_was_not_there_before(dtype: str) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, dtype], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr


def test_where_kernels_are_compiled_the_loop_answers_and_lookups_say_what_they_wait_for(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mfdist", "serve", "--data", str(tmp_path / "data")]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "empty")}
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        client = RawClient(process.stdout.readline().split()[-1])
        client.create("a")
        lookups = pb.Lookups(row_ids=tensor(np.zeros((1, 2), np.int64)), scores=tensor(np.ones((1, 2), np.float32)))
        failed: list[grpc.RpcError] = []

        def look_up() -> None:
            try:
                list(client.stub.Lookup(iter([pb.LookupRequest(table="a", lookups=lookups)]), timeout=3))
            except grpc.RpcError as error:
                failed.append(error)

        looking, times = threading.Thread(target=look_up), []
        looking.start()
        while looking.is_alive():
            began = time.monotonic()
            client.stub.Describe(pb.DescribeRequest(), timeout=60)
            times.append(time.monotonic() - began)
            time.sleep(0.02)
        looking.join()
        assert failed[0].code() is grpc.StatusCode.UNAVAILABLE
        assert re.search("being compiled, once on this machine", failed[0].details())
        assert max(times) < 2.0  # of a busy machine; compiling on the loop took ten
        process.send_signal(signal.SIGTERM)  # it waits for no more than the part that is being compiled
        assert process.wait(60) == 0
        assert log.read_text("utf-8").count("INFO compiling kernels, once on this machine") == 1
        assert "ERROR" not in log.read_text("utf-8")
    finally:
        process.kill()
        process.communicate(timeout=60)

"""A Ray cluster over several hosts: every node has its own, and one that dies is missed and comes back."""

import subprocess
import sys

import pytest

from tests.distributed import hosts as hosts_module
from tests.distributed.hosts import Hosts
from tests.distributed.loopback_hosts import LoopbackHosts
from tests.distributed.ray_nodes import RayNodes

pytest.importorskip("ray")

#: Prints the address that a task of each host sees, which is the node's own.
WHERE = """
import json, ray, sys
ray.init(log_to_driver=False, logging_level="error")
address = ray.remote(lambda: ray.util.get_node_ip_address())
names = sys.argv[1:]
print(json.dumps(ray.get([address.options(resources={name: 0.1}).remote() for name in names], timeout=60)))
"""


@pytest.mark.slow  # tests of mfdist launch start such clusters anyway
@pytest.mark.parametrize("kind", [LoopbackHosts, Hosts])
def test_a_node_runs_in_each_host_and_is_missed_when_that_is_killed(
    kind: type[Hosts], request: pytest.FixtureRequest
) -> None:
    if kind is Hosts:
        request.getfixturevalue("namespaces")
    with kind(2) as hosts, RayNodes(hosts) as nodes:
        names = [host.name for host in hosts]
        done = hosts[0].run([sys.executable, "-c", WHERE, *names], env=nodes.environment, timeout_s=120)
        assert done.stdout.strip() == str([host.address for host in hosts]).replace("'", '"'), done.stderr
        hosts[1].kill()
        nodes.wait_for(1)
        nodes.start(1)
        nodes.wait_for(2)


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_command_runs_beside_the_nodes_of_hosts() -> None:
    script = [sys.executable, hosts_module.__file__, "--hosts", "2", "--ray", "--", sys.executable, "-c", WHERE]
    done = subprocess.run([*script, "host0", "host1"], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ['["198.18.0.1", "198.18.0.2"]'], done.stderr

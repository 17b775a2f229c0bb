"""Topologies: JSON, other sizes, and figures that cannot be."""

import json
from dataclasses import replace

import pytest

from mfdist.errors import ConfigError
from mfdist.sharding.topology import TOPOLOGIES, Link, Topology, cpu, h100


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_json_gives_the_topology_back(name):
    topology = TOPOLOGIES[name](16, 2)
    assert Topology.from_json(topology.to_json()) == topology
    assert topology.name == name


def test_another_size_keeps_the_hosts_as_full_as_they_are():
    topology = h100(16, 2)
    assert (topology.resized(64).num_hosts, topology.resized(4).num_hosts) == (8, 1)
    assert topology.resized(64).ranks_per_host == 8
    with pytest.raises(ConfigError, match="hosts of 8; got 12"):
        topology.resized(12)


def test_a_tenth_of_the_memory_is_left_alone():
    assert cpu(1, memory_bytes=1000).usable_bytes == 900


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes=0"),
        ({"copy_bytes_per_s": float("nan")}, "copy_bytes_per_s=nan"),
        ({"inside": Link(bytes_per_s=0.0, latency_s=0.0)}, "inside.bytes_per_s=0.0"),
        ({"inside": Link(bytes_per_s=1.0, latency_s=-1.0)}, "inside.latency_s=-1.0"),
        ({"collective_s": -1.0}, "collective_s=-1.0"),
        ({"num_hosts": 3}, "got 8 ranks on 3 hosts"),
    ],
)
def test_figures_that_cannot_be_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(h100(8), **changes)


def edited(**changes):
    document = {**json.loads(h100(8).to_json()), **changes}
    return json.dumps({key: value for key, value in document.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "something else"),
        (edited(format="x"), "something else"),
        (edited(version=2), "version 1 of topologies; got 2"),
        (edited(bandwidth=3), 'unknown key "bandwidth"'),
        (edited(collective_s=None), 'key "collective_s" is missing'),
        (edited(world_size=8.5), "world_size has the wrong type"),
        (edited(collective_s=True), "collective_s has the wrong type"),
        (edited(inside=3), "inside must be a JSON object"),
        (edited(inside={"bytes_per_s": 3}), 'key "latency_s" is missing in inside'),
    ],
)
def test_what_is_wrong_in_a_file_is_told_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Topology.from_json(text)
    assert "\n" not in str(caught.value)

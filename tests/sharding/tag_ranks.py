"""What ranks do in the tests of tags' sockets."""

import socket
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mfdist.errors import UnavailableError
from mfdist.sharding import tag_links
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.tags import Call


def lines_of(rank, turn, world_size):
    """Return what a rank tells each other one: 3 numbers."""
    return torch.tensor([[rank, to, turn] for to in range(world_size)], dtype=torch.int64)


def told(rank, turns):
    """Return what each rank told this one in each turn; the turns are begun together and waited for last to first."""
    world_size, links = dist.get_world_size(), tag_links.connect(dist.group.WORLD)
    works = [
        links.start(torch.zeros(world_size, 3, dtype=torch.int64), lines_of(rank, turn, world_size), 60.0)
        for turn in range(turns)
    ]
    for work in reversed(works):
        work.wait()
    return [work.received.tolist() for work in works]


def is_connected_across_hosts(rank):
    """Return whether ranks whose hosts have other names are connected."""
    name = f"host-{rank}"
    socket.gethostname = lambda: name
    return tag_links.connect(dist.group.WORLD) is not None


def is_connected_without_a_folder(rank, folder):
    """Return whether ranks are connected where one has no folder that a socket can lie in."""
    if rank == 1:
        tempfile.tempdir = str(folder)
    return tag_links.connect(dist.group.WORLD) is not None


def waits_for_one_that_ends(rank):
    """Return what the others are told, and how soon, when the last rank's sockets are closed, as by a SIGKILL."""
    exchange = MeshExchanges(init_device_mesh("cpu", (dist.get_world_size(),)), deadline_s=100.0).everyone
    call = Call(table="t", kind="row_wise", phase="lookup")
    exchange.open(call).wait()
    if rank == dist.get_world_size() - 1:
        exchange._tag_links.close()
        time.sleep(6.0)  # were it to end, the others would be ended, too, before they have answered
        return None
    began = time.monotonic()
    try:
        exchange.open(call).wait()
    except UnavailableError as error:
        return str(error), time.monotonic() - began
    return None


def waits_for_one_that_is_late(rank, deadline_s):
    """Return what the first rank is told when the others do not come."""
    exchange = MeshExchanges(init_device_mesh("cpu", (dist.get_world_size(),)), deadline_s=deadline_s).everyone
    if rank:
        time.sleep(deadline_s + 4.0)
        return None
    try:
        exchange.open(Call(table="t", kind="row_wise", phase="lookup")).wait()
    except UnavailableError as error:
        return str(error)
    return None


def has_peer_memory(rank):
    """Return whether messages go by memory, as it is by default and as it was asked for: no."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = MeshExchanges(mesh), MeshExchanges(mesh, uses_peer_memory=False)
    return [each.everyone.has_peer_memory for each in made]


def loses_one_in_a_message(rank, turns):
    """Return what the first rank is told when the other ends between its tags and its part of a message."""
    exchange = MeshExchanges(init_device_mesh("cpu", (2,)), deadline_s=100.0).everyone
    call, payload = Call(table="t", kind="row_wise", phase="lookup"), torch.ones(2)
    for _ in range(turns):  # none: it ends while memory is taken
        exchange.swap(exchange.open(call), payload, [1, 1], [1, 1], 1)
    opened = exchange.open(call)
    opened.wait()
    if rank:
        exchange._tag_links.close()
        time.sleep(6.0)
        return None
    try:
        exchange.swap(opened, payload, [1, 1], [1, 1], 1)
    except UnavailableError as error:
        return str(error)
    return None

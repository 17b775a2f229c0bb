"""What ranks do in the suite of sharded tables on several GPUs; on CPUs the same over gloo."""

import ctypes
import random
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mfdist.optim import RowAdam, RowSGD
from mfdist.sharding import kinds
from mfdist.sharding.cost import price_table
from mfdist.sharding.mesh import MeshExchanges
from mfdist.sharding.tags import Call
from mfdist.sharding.topology import cpu
from mfdist.sharding.under_way import MAX_MESSAGE_BYTES
from mfdist.sharding.workload import TableLoad, Workload
from mfdist.spec import TableSpec
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.sharded_tables import ShardedConformance, run_conformance
from mfdist.testing.tolerances import TOLERANCES, relative_error
from tests.tables import sharded_ranks

KINDS = (
    "row_wise",
    "uneven_rows",
    "some_rows",
    "pooled_rows",
    "pooled_slots",
    "column_wise",
    "table_wise",
    "few_slots",
    "one_owner",
    "replicated",
)
FROM_TWO = ("uneven_columns", "grid", "slot_grid", "pooled_grid")
EXACT = ("row_wise", "uneven_rows", "some_rows", "column_wise", "uneven_columns", "one_owner", "grid")

#: Codes, as many rows as a table of 256 MiB on a CPU and 2 GiB on a GPU has.
_LOAD = TableLoad(num_lookups=32, code_stride=1024, id_bytes=4)
_TOKENS = 256
#: Messages of the exchange's part, and after how many of them each rank is late.
_MESSAGES, _LATE = 256, 16
_MMAP_THRESHOLD = -3  # of malloc.h


def kinds_for(world_size):
    """Return the kinds that so many ranks can have; grids need an even number."""
    return [kind for kind in (*KINDS, *FROM_TWO) if kind in KINDS or world_size % 2 == 0]


def exchanges_on(device, kind, peers=True):
    world_size = dist.get_world_size()
    shape = (2, world_size // 2) if "grid" in kind else (world_size,)
    return MeshExchanges(init_device_mesh(device, shape), uses_peer_memory=peers)


def links(rank, device, peers=True):
    """Return bytes to each other rank → the median time of a plain all-to-all of them, the same on all ranks."""
    found, world_size = {}, dist.get_world_size()
    for size in (1 << power for power in range(10, 25 if device == "cpu" else 29, 2)):
        sent = torch.zeros(size * world_size, dtype=torch.uint8, device=device)
        received, taken = torch.empty_like(sent), []
        for _ in range(12):
            dist.barrier()
            finish(device)
            began = time.perf_counter()
            dist.all_to_all_single(received, sent)
            finish(device)
            taken.append(time.perf_counter() - began)
        median = torch.tensor([statistics.median(taken[2:])], dtype=torch.float64, device=device)
        dist.all_reduce(median, dist.ReduceOp.MAX)
        found[size] = median.item()
    return found


def exchanged(rank, device, peers=True):
    """Return how many elements of many messages arrived wrong, and whether GPUs read them in each other's memory.

    Sizes differ from message to message and rank to rank, and ranks are late in turn; nobody waits for a device, so
    that a message which is laid out too early spoils the one before.
    """
    world_size, same = dist.get_world_size(), random.Random(0)
    exchange = exchanges_on(device, "", peers).everyone
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def values(size, source, target, turn, dtype):
        period = (torch.arange(251, device=device) * (turn + 3 * source + 7 * target + 1) % 251).to(dtype)
        return period.repeat(size // 251 + 1)[:size]

    def writer(pieces):
        return lambda to, part: part.copy_(pieces[to])

    largest = [MAX_MESSAGE_BYTES] if device == "cuda" else []  # two of them are of more bytes than 32 bits count
    for turn, fewest in enumerate([0] * _MESSAGES + largest):
        most, dtype = fewest + (1 << same.randrange(2, 21)), same.choice((torch.uint8, torch.float32, torch.int64))
        if fewest:
            dtype = torch.uint8
        sizes = [[same.randrange(fewest, most + 1) for _ in range(world_size)] for _ in range(world_size)]
        sent = torch.cat([values(size, rank, target, turn, dtype) for target, size in enumerate(sizes[rank])])
        wanted = torch.cat([values(line[rank], source, rank, turn, dtype) for source, line in enumerate(sizes)])
        opened = exchange.open(Call(table="", kind="suite", phase="check"), [turn])
        numbers = (sizes[rank], [line[rank] for line in sizes], max(map(max, sizes)))
        if turn % 2:
            pieces = sent.split_with_sizes(sizes[rank])
            got = exchange.lend(
                opened, lambda to, part, pieces=pieces: part.copy_(pieces[to]), dtype, *numbers
            ).joined()
        else:
            got = exchange.swap(opened, sent, *numbers)
        wrong += (got != wanted).sum()
        if turn % _LATE == rank:
            time.sleep(0.02)
        assert [line[0] for line in opened.wait()] == [turn] * world_size
    return int(wrong), exchange.has_peer_memory


def finish(device):
    if device == "cuda":
        torch.cuda.synchronize()


def conformance(rank, kind, device, peers=True):
    """Return the names of the cases every table must pass, passed by this kind."""
    exchanges, world_size = exchanges_on(device, kind, peers), dist.get_world_size()
    suite = ShardedConformance(exchanges, lambda spec: sharded_ranks.make_plan(kind, spec, world_size))
    with exchanges.device:
        names = run_conformance(suite)
    assert exchanges.everyone.has_peer_memory == (peers and world_size > 1), "messages did not go as was asked"
    return names


def equality(rank, kind, device, peers=True):
    """Return the largest distance from an unsharded table on one device, and whether all bits are the same."""
    distance, is_exact = 0.0, True
    for stride in (0, 8):
        got, wanted, repeats = sharded_ranks.compared(rank, kind, stride, {}, exchanges_on(device, kind, peers))
        assert repeats, f"{kind} gave other bits in a repetition"
        for one, other in zip(got, wanted, strict=True):
            distance = max(distance, relative_error(one.cpu(), other.cpu()))
        is_exact &= all(torch.equal(one, other) for one, other in zip(got[:2], wanted[:2], strict=True))
    assert distance <= TOLERANCES["float32"], f"{kind} is {distance:.1e} off"
    return distance, is_exact


def peak_memory(rank, kind, device, peers=True):
    """Return this rank's bytes: of its rows and states, at the fullest moment of training, and what is allowed then.

    Allowed is its share of the table with Adam's states, 10 % of that, what the plan announces beside, and mailboxes:
    of the others' the system counts on a CPU what this rank has touched, too.
    """
    world_size = dist.get_world_size()
    rows, width = _LOAD.num_lookups * _LOAD.code_stride, 2048 if device == "cpu" else 16384
    small = TableSpec(name="small", num_rows=rows, row_dim=64)
    _trained(kind, device, small, peers)  # what is compiled and allocated once
    before = _reset_peak(device)
    spec = TableSpec(name="large", num_rows=rows, row_dim=width)
    table = _trained(kind, device, spec, peers)
    peak = _peak(device) - before
    held = table.weight.nbytes + sum(state.nbytes for state in table.row_state.tensors.values())
    workload = Workload(
        batch_tokens=_TOKENS * world_size, loads={spec.name: _LOAD}, rule="adam", is_fused=True, deduplicate=True
    )
    cost = price_table(table.plan, cpu(world_size, 2 if "grid" in kind else 1), workload)
    announced = cost.held.on_ranks(cost.footprint.saved + cost.footprint.transient)[rank]
    mailboxes = (2 if device == "cpu" else 1) * sum(each.mailbox_bytes for each in table.exchanges.all)
    allowed = 1.1 * 3 * spec.num_bytes / world_size + mailboxes
    return {"held": held, "peak": peak, "announced": announced, "mailboxes": mailboxes, "allowed": allowed}


def larger_than_one(rank, num_bytes, device, peers=True):
    """Train a table of so many bytes, columns cut; return this rank's bytes once its sums are those expected."""
    world_size, num_tokens, num_lookups, width = dist.get_world_size(), 64, 8, 8192
    rows = num_bytes // (2 * width)
    spec = TableSpec(name="huge", num_rows=rows, row_dim=width, dtype=torch.bfloat16)
    exchanges = exchanges_on(device, "column_wise", peers)
    table = ShardedTable(kinds.column_wise(spec, world_size), exchanges, device=exchanges.device, seed=5)
    table.fuse(RowSGD(lr=1.0))
    # All lookups of all ranks are of different rows, the last one among them.
    lookups = torch.arange(num_tokens * num_lookups * world_size) * (rows // (num_tokens * num_lookups * world_size))
    lookups[-1] = rows - 1
    ids = lookups.view(world_size, num_tokens, num_lookups)[rank].to(exchanges.device)
    scores = torch.ones(num_tokens, num_lookups, device=exchanges.device)
    grads = torch.ones(num_tokens, width, device=exchanges.device, dtype=torch.bfloat16)
    before = table(ids, scores)
    expected = before.detach().float() - num_lookups / world_size
    before.backward(grads)
    after = table(ids, scores).detach().float()
    assert relative_error(after.cpu(), expected.cpu()) <= TOLERANCES["bfloat16"]
    return table.weight.nbytes


def _trained(kind, device, spec, peers):
    world_size = dist.get_world_size()
    exchanges = exchanges_on(device, kind, peers)
    plan = sharded_ranks.make_plan(kind, spec, world_size, _LOAD.code_stride)
    table = ShardedTable(plan, exchanges, device=exchanges.device).fuse(RowAdam(lr=0.1))
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, _LOAD.code_stride, (_TOKENS, _LOAD.num_lookups), generator=generator).int()
    ids = ids.to(exchanges.device)
    scores = torch.rand(_TOKENS, _LOAD.num_lookups, generator=generator).to(exchanges.device).requires_grad_()
    for _ in range(2):
        table(ids, scores, code_stride=_LOAD.code_stride).sum().backward()
    return table


def _reset_peak(device):
    """Return the memory held now, from which a new peak is counted; on a CPU, Linux's resident memory."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back at once, and counts no longer
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak(device):
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

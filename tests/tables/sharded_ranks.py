"""What ranks do in the tests of sharded tables; in a module of its own, since their processes import it."""

import socket
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store

from mfdist.errors import MfdistError
from mfdist.optim import RowAdagrad, RowAdam, RowSGD
from mfdist.sharding import kinds, under_way
from mfdist.sharding.cuts import even_cuts
from mfdist.sharding.mesh import MeshExchanges
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.sharded_tables import ShardedConformance, put_together, run_conformance, sharded


def make_plan(kind, spec, world_size, stride=0, **options):
    """Return a plan of a kind, as even as it gets; `uneven` and `permuted` are row-wise and column-wise splits."""
    if kind == "row_wise":
        return kinds.row_wise(spec, world_size, **options)
    if kind == "uneven_rows":
        cuts = [0, *(spec.num_rows * part // 10 for part in range(1, world_size)), spec.num_rows]
        return kinds.row_wise(spec, list(reversed(range(world_size))), cuts=cuts, **options)
    if kind == "some_rows":  # the first rank has none
        return kinds.row_wise(spec, range(1, world_size) if world_size > 1 else 1, deduplicate=False, **options)
    if kind == "pooled_rows":  # cut within slots
        inner = [cut + 1 for cut in even_cuts(spec.num_rows, world_size)[1:-1]]
        return kinds.row_wise(spec, world_size, cuts=(0, *inner, spec.num_rows), pooled=True, **options)
    if kind == "pooled_slots":
        cuts = even_cuts(spec.num_rows, world_size, stride or 1)
        return kinds.row_wise(spec, world_size, cuts=cuts, pooled=True, **options)
    if kind == "pooled_grid":
        return kinds.grid(spec, 2, world_size // 2, pooled=True, **options)
    if kind == "column_wise":
        return kinds.column_wise(spec, world_size, **options)
    if kind == "uneven_columns":  # the last rank has none
        width = spec.row_dim // 3
        cuts = [0, *([width] * (world_size - 2)), spec.row_dim]
        return kinds.column_wise(spec, [*range(1, world_size - 1), 0], cuts=cuts, **options)
    if kind == "table_wise":
        return kinds.table_wise(spec, world_size, stride or 1, **options)
    if kind == "few_slots":  # fewer than ranks; the first has none
        cuts = even_cuts(spec.num_rows, max(1, world_size - 1), stride or 1)
        return kinds.table_wise(spec, world_size, stride or 1, cuts=(0, *cuts)[-world_size - 1 :], **options)
    if kind == "one_owner":
        return kinds.table_wise(spec, [world_size - 1], 0, **options)
    if kind == "grid":
        return kinds.grid(spec, 2, world_size // 2, **options)
    if kind == "slot_grid":
        return kinds.grid(spec, 2, world_size // 2, code_stride=stride or 1, **options)
    assert kind == "replicated"
    options.pop("forward_dtype", None)
    return kinds.replicated(spec, **options)


def exchanges_for(kind, world_size, **options):
    shape = (2, world_size // 2) if "grid" in kind else (world_size,)
    exchanges = MeshExchanges(init_device_mesh("cpu", shape), **options)
    for each in exchanges.all:
        spoil_what_was_lent(each)
    return exchanges


def spoil_what_was_lent(exchange):
    """Overwrite what an exchange has lent as soon as its next message is sent, as happens where GPUs share memory."""
    lend, lend_made, send, lent_before = exchange.lend, exchange.lend_made, exchange._send, []

    def spoil():
        while lent_before:
            lent_before.pop().view(torch.uint8).fill_(0xFF)

    def sends(*arguments, **options):
        spoil()
        return send(*arguments, **options)

    def lends(*arguments, own=None, **options):
        spoil()
        lent = lend(*arguments, own=own, **options)
        lent_before.extend(part for rank, part in enumerate(lent.parts) if own is None or rank != exchange.rank)
        return lent

    def lends_pieces(opened, payload, sizes, arriving, largest):
        pieces = payload.split_with_sizes(list(sizes))

        def write(rank, part):
            part.copy_(pieces[rank])

        numbers = (payload.dtype, sizes, arriving, largest)
        return exchange.lend(opened, write, *numbers, own=pieces[exchange.rank]).parts

    def lends_made(*arguments, meanwhile=None):
        spoil()
        lent = lend_made(*arguments, meanwhile=meanwhile)
        lent_before.extend(part for rank, part in enumerate(lent.parts) if meanwhile or rank != exchange.rank)
        return lent

    exchange.lend, exchange._send, exchange.lend_pieces = lends, sends, lends_pieces
    exchange.lend_made = lends_made


def conformance(rank, kind):
    world_size = dist.get_world_size()
    exchanges = exchanges_for(kind, world_size)
    return run_conformance(ShardedConformance(exchanges, lambda spec: make_plan(kind, spec, world_size)))


def token_counts(world_size):
    """Return how many tokens each rank has: different numbers, and none on one of them."""
    return [(37, 0, 50, 8)[rank % 4] + rank // 4 for rank in range(world_size)]


def lookup_of(stride, num_lookups, num_rows, num_tokens, row_dim):
    """Return ids or codes, scores and the gradient of the output, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    limit = stride or num_rows
    ids = torch.randint(0, limit, (num_tokens, num_lookups), generator=generator)
    scores = torch.randn(num_tokens, num_lookups, generator=generator)
    grads = torch.randn(num_tokens, row_dim, generator=generator)
    return (ids.to(torch.uint8) if stride and limit <= 256 else ids.int()), scores, grads


def unsharded(rows, ids, scores, grads, stride):
    """Return what one table gives for all ranks' tokens: sums, row gradients and score gradients."""
    table = LocalTable(TableSpec(name="t", num_rows=rows.shape[0], row_dim=rows.shape[1], dtype=rows.dtype))
    table.to(rows.device)
    with torch.no_grad():
        table.weight.copy_(rows)
    scores = scores.clone().requires_grad_()
    out = table(ids, scores, code_stride=stride)
    out.backward(grads.to(out.dtype))
    return out.detach(), table.weight.grad, scores.grad


def compared(rank, kind, stride, options, exchanges=None):
    """Return this rank's (sums, whole row gradient, score gradients), each with the unsharded table's."""
    world_size = dist.get_world_size()
    num_lookups, row_dim, dtype = 5, 23, options.pop("dtype", torch.float32)
    num_rows = num_lookups * (stride or 40)
    counts = token_counts(world_size)
    exchanges = exchanges or exchanges_for(kind, world_size)
    device = exchanges.device
    rows = torch.randn(num_rows, row_dim, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    parts = lookup_of(stride, num_lookups, num_rows, sum(counts), row_dim)
    ids, scores, grads = (part.to(device) for part in parts)
    scaled = grads.to(dtype) / world_size
    wanted = unsharded(rows, ids, scores, scaled, stride)
    spec = TableSpec(name="t", num_rows=num_rows, row_dim=row_dim, dtype=dtype)
    table = sharded(rows, make_plan(kind, spec, world_size, stride, **options), exchanges)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    got = []
    for _ in range(2):
        table.weight.grad = None
        own = scores[mine].clone().requires_grad_()
        out = table(ids[mine], own, code_stride=stride)
        out.backward(grads[mine].to(dtype))
        got.append((out.detach(), put_together(table, table.weight.grad), own.grad))
    repeats = all(torch.equal(one, two) for one, two in zip(*got, strict=True))
    return got[0], (wanted[0][mine], wanted[1], wanted[2][mine] * world_size), repeats


def sends(rank, kind, stride):
    """Return what lookups, their gradients and an update sent: of each exchange its ranks and its messages."""
    world_size = dist.get_world_size()
    exchanges = exchanges_for(kind, world_size)
    for each in exchanges.all:
        each.traffic.sends = []
    compared(rank, kind, stride, {}, exchanges)
    spec = TableSpec(name="t", num_rows=5 * (stride or 40), row_dim=23)
    table = ShardedTable(make_plan(kind, spec, world_size, stride), exchanges).fuse(RowAdagrad(lr=0.1))
    ids, scores, grads = lookup_of(stride, 5, spec.num_rows, 2 * rank, spec.row_dim)  # none on rank 0
    table(ids, scores.requires_grad_(), code_stride=stride).backward(grads)
    return [(each.ranks, each.traffic.sends) for each in exchanges.all]


def on_hosts_of_their_own(rank, function, *arguments):
    """Return what a function gives where each rank's host has another name: tags and payloads go by collectives."""
    known, socket.gethostname = socket.gethostname, lambda: f"host-{rank}"
    try:
        assert not exchanges_for("row_wise", dist.get_world_size()).everyone.has_peer_memory
        return function(rank, *arguments)
    finally:
        socket.gethostname = known


def chunked(rank, kind, stride):
    """Return whether a lookup in chunks has the bits of one without, and how many messages each took."""
    results, messages = [], []
    for chunk_bytes in (None, 256):
        exchanges = exchanges_for(kind, dist.get_world_size(), chunk_bytes=chunk_bytes)
        results.append(compared(rank, kind, stride, {}, exchanges)[0])
        messages.append(exchanges.everyone.traffic.num_messages)
    return all(torch.equal(one, two) for one, two in zip(*results, strict=True)), messages


def messages(rank, kind, stride):
    """Return how many messages this rank sent to the other in a lookup and its backward."""
    spec = TableSpec(name="t", num_rows=5 * (stride or 40), row_dim=23)
    exchanges = exchanges_for(kind, 2)
    table = ShardedTable(make_plan(kind, spec, 2, stride), exchanges)
    ids, scores, grads = lookup_of(stride, 5, spec.num_rows, 40, spec.row_dim)
    table(ids, scores.requires_grad_(), code_stride=stride).backward(grads)
    return exchanges.everyone.traffic.num_messages


def in_pieces(rank, kind, stride):
    """Return whether messages cut into pieces of 64 bytes change a bit."""
    whole = compared(rank, kind, stride, {})[0]
    before, under_way.MAX_MESSAGE_BYTES = under_way.MAX_MESSAGE_BYTES, 64
    try:
        pieces = compared(rank, kind, stride, {})[0]
    finally:
        under_way.MAX_MESSAGE_BYTES = before
    return all(torch.equal(one, two) for one, two in zip(whole, pieces, strict=True))


def initial_rows(rank, kind):
    """Return whether a sharded table starts with the values of a local one after the same seed."""
    spec = TableSpec(name="t", num_rows=2100, row_dim=300)
    torch.manual_seed(5)
    local = LocalTable(spec, std=0.5)
    torch.manual_seed(5)
    table = sharded_table(kind, spec)
    return torch.equal(put_together(table, table.weight), local.weight)


def sharded_table(kind, spec, stride=0):
    world_size = dist.get_world_size()
    return ShardedTable(make_plan(kind, spec, world_size, stride), exchanges_for(kind, world_size), std=0.5)


def mean_loss(rank, kind):
    """Return the whole gradient where each rank's loss is the mean over its tokens."""
    spec = TableSpec(name="t", num_rows=16, row_dim=4)
    table = sharded(
        torch.arange(64.0).view(16, 4), make_plan(kind, spec, dist.get_world_size()), exchanges_for(kind, 2)
    )
    scores = torch.ones(3, 1, requires_grad=True)
    table(torch.tensor([[0], [9], [9]]) + rank, scores).sum(dim=1).mean().backward()
    return put_together(table, table.weight.grad), scores.grad


def other_inputs(rank, kind):
    """Return what each rank is told when rank 1 alone gives an id outside; then a lookup that works."""
    spec = TableSpec(name="words", num_rows=16, row_dim=4)
    table = sharded(torch.ones(16, 4), make_plan(kind, spec, dist.get_world_size()), exchanges_for(kind, 3))
    told = ""
    try:
        table(torch.tensor([[3], [16 if rank == 1 else 5]]), torch.ones(2, 1))
    except MfdistError as error:
        told = f"{error.kind}: {error}"
    return told, table(torch.tensor([[3]]), torch.ones(1, 1)).tolist()


def other_tables(rank):
    """Return what each rank is told when rank 1 looks up in another table than the rest."""
    exchanges = exchanges_for("column_wise", 3)
    tables = [
        sharded(torch.ones(16, 4), make_plan("column_wise", TableSpec(name=name, num_rows=16, row_dim=4), 3), exchanges)
        for name in ("words", "bytes")
    ]
    try:
        tables[int(rank == 1)](torch.tensor([[3]]), torch.ones(1, 1))
    except MfdistError as error:
        return f"{error.kind}: {error}"
    return ""


def late(rank, what):
    """Return what ranks 0 and 2 are told when rank 1 does not come to a lookup, or to a gradient."""
    spec = TableSpec(name="words", num_rows=16, row_dim=4)
    table = sharded(torch.ones(16, 4), make_plan("column_wise", spec, 3), exchanges_for("column_wise", 3, deadline_s=3))
    store = _get_default_store()
    try:
        if what == "gradient" or rank != 1:
            out = table(torch.tensor([[3]]), torch.ones(1, 1, requires_grad=True))
            if rank != 1:
                out.sum().backward()
    except MfdistError as error:
        return f"{error.kind}: {error}"
    finally:
        store.set(f"told-{rank}", "")
        store.wait(["told-0", "told-2"], timedelta(seconds=30))  # whoever leaves would be missed for that
    return ""


OPTIMIZERS = {
    "sgd": RowSGD(lr=0.1),
    "adagrad": RowAdagrad(lr=0.1, weight_decay=0.1),
    "adam": RowAdam(lr=0.1, seed=3, state_dtype=torch.bfloat16),
    "adam in bytes": RowAdam(lr=0.1, seed=3, state_dtype=torch.uint8),
}


def fused(rank, kind, stride, rule, dtype):
    """Return the rows after two fused steps beside those of one table that sees all tokens."""
    world_size, num_lookups, row_dim = dist.get_world_size(), 5, 23
    counts, num_rows = token_counts(world_size), num_lookups * (stride or 40)
    rows = torch.randn(num_rows, row_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids, scores, grads = lookup_of(stride, num_lookups, num_rows, sum(counts), row_dim)
    spec = TableSpec(name="t", num_rows=num_rows, row_dim=row_dim, dtype=dtype)
    local = LocalTable(spec)
    with torch.no_grad():
        local.weight.copy_(rows)
    local.fuse(OPTIMIZERS[rule])
    table = sharded(rows, make_plan(kind, spec, world_size, stride), exchanges_for(kind, world_size))
    table.fuse(OPTIMIZERS[rule])
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    for _ in range(2):
        local(ids, scores, code_stride=stride).backward(grads.to(dtype) / world_size)
        table(ids[mine], scores[mine], code_stride=stride).backward(grads[mine].to(dtype))
    assert table.row_state.num_updates == 2 and table.weight.grad is None
    return put_together(table, table.weight), local.weight


def updated_apart(rank, kind):
    """Return the errors' kind and what changed where two ranks go backward through one of two tables each."""
    spec, exchanges = TableSpec(name="a", num_rows=40, row_dim=8), exchanges_for(kind, 2, uses_peer_memory=False)
    tables = []
    for name in ("a", "b"):
        plan = make_plan(kind, replace(spec, name=name), 2)
        tables.append(ShardedTable(plan, exchanges, seed=3).fuse(RowAdagrad(lr=0.1)))
    ids, scores, grads = lookup_of(0, 5, spec.num_rows, 9, spec.row_dim)
    outs = [table(ids, scores.clone().requires_grad_()) for table in tables]
    before = tables[rank].weight.detach().clone()
    try:
        outs[rank].backward(grads)
    except MfdistError as error:
        return error.kind, torch.equal(before, tables[rank].weight), int(tables[rank].row_state.count)
    return None

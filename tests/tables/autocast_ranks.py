"""What ranks do in tests of sharded tables: under autocast, where most rows are read, where kernels meet bad ids."""

import torch
import torch.distributed as dist

from mfdist.errors import MfdistError
from mfdist.kernels import row_id_check
from mfdist.optim import RowAdagrad, RowAdam, RowSGD
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.testing.sharded_tables import put_together, sharded
from tests.tables.sharded_ranks import exchanges_for, lookup_of, make_plan, token_counts


def fused_under_autocast(rank, kind, dtype=torch.bfloat16, scale=1.0):
    """Return sums and rows of a fused step under autocast beside those of one table, and bytes sent in the lookup."""
    world_size, num_lookups, row_dim, stride = dist.get_world_size(), 5, 24, 8
    counts = token_counts(world_size)
    rows = torch.randn(num_lookups * stride, row_dim, generator=torch.Generator().manual_seed(3))
    ids, scores, grads = lookup_of(stride, num_lookups, rows.shape[0], sum(counts), row_dim)
    spec, exchanges = TableSpec(name="t", num_rows=rows.shape[0], row_dim=row_dim), exchanges_for(kind, world_size)
    local, table = LocalTable(spec), sharded(rows, make_plan(kind, spec, world_size, stride), exchanges)
    with torch.no_grad():
        local.weight.copy_(rows)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    for each in (local, table):
        each.fuse(RowSGD(lr=0.1))
    grads = (scale * grads).to(dtype)
    with torch.autocast("cpu", dtype):
        wanted = local(ids, scores, code_stride=stride)
        out = table(ids[mine], scores[mine], code_stride=stride)
    sent = sum(each.traffic.num_bytes["lookup"] for each in exchanges.all)
    wanted.backward(grads)  # of the sum over the ranks, not their mean
    table.row_state.lr *= world_size
    out.backward(grads[mine])
    return (out.detach(), wanted[mine].detach()), (put_together(table, table.weight), local.weight.detach()), sent


RULES = {
    "sgd": RowSGD(lr=0.1, weight_decay=0.1),
    "adagrad": RowAdagrad(lr=0.1, weight_decay=0.1),
    "adam": RowAdam(lr=0.1, weight_decay=0.1, seed=3),
}


def mostly_read(rank, kind, rule, dtype):
    """Return rows after two steps that look up the same half of each slot's, beside one table's, and the first rows."""
    world_size, num_lookups, stride, num_tokens = dist.get_world_size(), 5, 8, 60
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(num_lookups * stride, 23, generator=generator, dtype=dtype)
    ids = torch.randint(0, stride // 2, (num_tokens * world_size, num_lookups), generator=generator)
    scores = torch.randn(ids.shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
    grads = torch.randn(ids.shape[0], 23, generator=generator, dtype=dtype)
    spec = TableSpec(name="t", num_rows=rows.shape[0], row_dim=23, dtype=dtype)
    local = LocalTable(spec).fuse(RULES[rule])
    table = sharded(rows, make_plan(kind, spec, world_size, stride), exchanges_for(kind, world_size)).fuse(RULES[rule])
    with torch.no_grad():
        local.weight.copy_(rows)
    mine = slice(num_tokens * rank, num_tokens * (rank + 1))
    for _ in range(2):
        local(ids, scores, code_stride=stride).backward(grads / world_size)
        table(ids[mine], scores[mine], code_stride=stride).backward(grads[mine])
    return put_together(table, table.weight), local.weight.detach(), rows


def hasty(rank, counts, dtype):
    """Return whether sums and rows are those of lookups that wait for the sizes, as each rank's tokens change.

    The first kind of error follows that this rank gets where rank 1 refuses.
    """
    spec = TableSpec(name="t", num_rows=40, row_dim=24)
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    tables = [sharded(rows, make_plan("column_wise", spec, 2), exchanges_for("column_wise", 2)) for _ in range(2)]
    tables[1].exchanges.everyone.is_hasty = True
    for table in tables:
        table.fuse(RowSGD(lr=0.1))
    is_same = []
    for step, each in enumerate(counts):
        generator = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(0, 8, (each[rank], 5), generator=generator).int()
        found = []
        for table in tables:
            scores = torch.ones(each[rank], 5, requires_grad=True)
            with torch.autocast("cpu", dtype):
                out = table(ids, scores, code_stride=8)
            out.sum().backward()
            found.append((out.detach(), table.weight.detach().clone(), scores.grad))
        is_same.append(all(torch.equal(one, two) for one, two in zip(*found, strict=True)))
    if rank == 1:
        row_id_check.error_word("t", 8, is_code=True).fill_(99)
    try:
        with torch.autocast("cpu", dtype):
            tables[1](
                torch.zeros(counts[-1][rank], 5, dtype=torch.int32), torch.ones(counts[-1][rank], 5), code_stride=8
            )
    except MfdistError as error:
        return is_same, error.kind
    return is_same, ""


def other_autocast(rank):
    """Return what each rank is told when rank 1 alone looks up under autocast; then a lookup that works."""
    spec = TableSpec(name="words", num_rows=16, row_dim=4)
    table = sharded(torch.ones(16, 4), make_plan("column_wise", spec, 2), exchanges_for("column_wise", 2))
    told = ""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
            table(torch.tensor([[3]]), torch.ones(1, 1))
    except MfdistError as error:
        told = f"{error.kind}: {error}"
    return told, table(torch.tensor([[3]]), torch.ones(1, 1)).tolist()


def met_by_a_kernel(rank, kind):
    """Return what each rank is told once a kernel of rank 1 has met a bad id; then a lookup that works."""
    spec = TableSpec(name="words", num_rows=16, row_dim=4)
    table = sharded(torch.ones(16, 4), make_plan(kind, spec, dist.get_world_size()), exchanges_for(kind, 3))
    ids, told = torch.tensor([[3]]), ""
    if rank == 1:
        row_id_check.error_word("words", 16, is_code=False).fill_(99)  # as kernels do
    try:
        table(ids, torch.ones(1, 1))
    except MfdistError as error:
        told = f"{error.kind}: {error}"
    scores = torch.ones(1, 1, requires_grad=True)
    out = table(ids, scores)
    if rank == 1:
        row_id_check.error_word("words", 16, is_code=False).fill_(98)
    out.sum().backward()  # others wait for this rank: it goes through, and the next lookup says it
    try:
        table(ids, torch.ones(1, 1))
    except MfdistError as error:
        told += f"; {error.kind}: {error}"
    return told, scores.grad.tolist()

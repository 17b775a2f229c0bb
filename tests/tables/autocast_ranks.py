"""What ranks do in tests of sharded tables under autocast, and of bad ids that kernels meet."""

import torch
import torch.distributed as dist

from mfdist.errors import MfdistError
from mfdist.kernels import row_id_check
from mfdist.optim import RowSGD
from mfdist.spec import TableSpec
from mfdist.tables.local import LocalTable
from mfdist.testing.sharded_tables import put_together, sharded
from tests.tables.sharded_ranks import exchanges_for, lookup_of, make_plan, token_counts


def fused_under_autocast(rank, kind):
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
    with torch.autocast("cpu", torch.bfloat16):
        wanted = local(ids, scores, code_stride=stride)
        out = table(ids[mine], scores[mine], code_stride=stride)
    sent = sum(each.traffic.num_bytes["lookup"] for each in exchanges.all)
    wanted.backward(grads.bfloat16() / world_size)
    out.backward(grads[mine].bfloat16())
    return (out.detach(), wanted[mine].detach()), (put_together(table, table.weight), local.weight.detach()), sent


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

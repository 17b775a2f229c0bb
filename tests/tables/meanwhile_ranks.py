"""What ranks do in the tests of what is computed, or begun, while something else is on its way."""

import torch
import torch.distributed as dist

from mfdist.errors import MfdistError
from mfdist.optim import RowSGD
from mfdist.sharding.routes import column_wise
from mfdist.sharding.routes.local import LocalRoute
from mfdist.spec import TableSpec
from mfdist.tables.sharded import ShardedTable
from mfdist.testing.sharded_tables import sharded
from tests.tables.sharded_ranks import compared, exchanges_for, lookup_of, make_plan, token_counts


def made_in_parts(rank, kind, stride):
    """Return whether sums made and sent rank by rank have the bits of those made at once, and were in each case."""
    made, results = column_wise.ColumnWise._return_parts, []
    times = []

    def counted(*arguments, **options):
        times.append(len(results))
        return made(*arguments, **options)

    before, column_wise._PART_BYTES = column_wise._PART_BYTES, 1
    column_wise.ColumnWise._return_parts = counted
    try:
        results.append(compared(rank, kind, stride, {})[0])
        column_wise._PART_BYTES = before
        results.append(compared(rank, kind, stride, {})[0])
    finally:
        column_wise._PART_BYTES, column_wise.ColumnWise._return_parts = before, made
    return all(torch.equal(one, two) for one, two in zip(*results, strict=True)), set(times)


def ordered_meanwhile(rank, kind, rule):
    """Return whether two updates whose lookups are put in order while gradients travel leave the bits of others.

    Also how often that was done. A CPU has nothing to put in order, but what is sent goes the same way.
    """
    world_size, stride = dist.get_world_size(), 8
    ordered, asked = LocalRoute.ordered, []

    def counted(*arguments):
        asked.append(True)
        return ordered(*arguments)

    spec, counts = TableSpec(name="t", num_rows=5 * stride, row_dim=23), token_counts(world_size)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    ids, scores, grads = (part[mine] for part in lookup_of(stride, 5, spec.num_rows, sum(counts), spec.row_dim))
    results, times = [], []
    for is_hasty in (True, False):
        exchanges = exchanges_for(kind, world_size)
        exchanges.everyone.is_hasty = is_hasty
        table = ShardedTable(make_plan(kind, spec, world_size, stride), exchanges, seed=3).fuse(rule(lr=0.1))
        LocalRoute.ordered = counted
        try:
            for _ in range(2):
                own = scores.clone().requires_grad_()
                table(ids, own, code_stride=stride).backward(grads)
        finally:
            LocalRoute.ordered = ordered
        results.append((table.weight.detach().clone(), own.grad))
        times.append(len(asked))
    return all(torch.equal(one, two) for one, two in zip(*results, strict=True)), times


def evaluated_first(rank, kind):
    """Return whether rows trained after evaluations in inference mode are those of a training without."""
    world_size, stride = dist.get_world_size(), 8
    spec = TableSpec(name="t", num_rows=5 * stride, row_dim=23)
    rows = []
    for is_evaluated in (True, False):
        table = ShardedTable(make_plan(kind, spec, world_size, stride), exchanges_for(kind, world_size), seed=3)
        table.fuse(RowSGD(lr=0.1))
        for num_tokens in (6, 4):
            ids, scores, grads = lookup_of(stride, 5, spec.num_rows, num_tokens, spec.row_dim)
            if is_evaluated:
                with torch.inference_mode():
                    table(ids, scores, code_stride=stride)
            table(ids, scores.requires_grad_(), code_stride=stride).backward(grads)
        rows.append(table.weight.detach().clone())
    return torch.equal(*rows)


def hasty(rank, kind, stride):
    """Return whether lookups begun before it is known how much arrives have the bits of others, and their messages.

    Then what this rank is told where rank 1 refuses for one reason after the other, and whether the lookups that come
    next have those bits again.
    """
    spec = TableSpec(name="t", num_rows=5 * stride, row_dim=23)
    rows = torch.randn(spec.num_rows, spec.row_dim, generator=torch.Generator().manual_seed(3))
    tables = [sharded(rows, make_plan(kind, spec, 2, stride), exchanges_for(kind, 2)) for _ in range(2)]
    tables[1].exchanges.everyone.is_hasty = True

    def same(seed, num_tokens):
        """Look up in both tables; return whether the bits are the same, and the second one's messages."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, stride, (num_tokens, 5), generator=generator).int()
        scores = torch.randn(num_tokens, 5, generator=generator)
        found = []
        for table in tables:
            table.weight.grad, traffic = None, table.exchanges.everyone.traffic
            own, before = scores.clone().requires_grad_(), traffic.num_messages
            out = table(ids, own, code_stride=stride)
            sent = traffic.num_messages - before
            out.sum().backward()
            found.append((out.detach(), table.weight.grad, own.grad))
        return all(torch.equal(one, two) for one, two in zip(*found, strict=True)), sent

    counts = ((5, 9), (5, 9), (5, 9), (5, 3), (5, 3), (5, 3), (6, 9))
    results = [same(10 * call + rank, each[rank]) for call, each in enumerate(counts)]
    results += [same(rank, 4) for _ in range(2)]
    ids, scores, told, after = torch.zeros(4, 5, dtype=torch.int32), torch.ones(4, 5), [], []
    bad = [(ids + stride, scores), (ids, scores.double()), (ids, scores.bfloat16()), (ids.float(), scores)]
    for wrong in [*bad, (ids.to("meta"), scores.to("meta"))]:
        try:
            tables[1](*(wrong if rank else (ids, scores)), code_stride=stride)
        except MfdistError as error:
            told.append(error.kind)
        after += [same(rank, 4)[0] for _ in range(3)]  # the second is as many as before, and the third begins before
    return results, told, after

"""Strategies for tables and their plans."""

import torch
from hypothesis import strategies as st

from mfdist.sharding.kinds import column_wise, grid, replicated, row_wise, table_wise
from mfdist.sharding.plan import ShardingPlan
from mfdist.sharding.table_plan import WIRE_DTYPES
from mfdist.spec import TableSpec

WORLD_SIZE = 6
_wire = st.none() | st.sampled_from(WIRE_DTYPES)


def cuts_of(size: int, num_parts: int, step: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """Return any cuts of `size`, empty parts among them."""
    inner = st.lists(st.integers(0, size // step), min_size=num_parts - 1, max_size=num_parts - 1)
    return inner.map(lambda cuts: (0, *(cut * step for cut in sorted(cuts)), size))


@st.composite
def table_plans(draw, name: str = "t"):
    """Return a plan of any kind over some of WORLD_SIZE ranks."""
    stride = draw(st.integers(1, 5))
    spec = TableSpec(
        name=name,
        num_rows=stride * draw(st.integers(1, 12)),
        row_dim=draw(st.integers(1, 12)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    owners = draw(st.permutations(range(WORLD_SIZE)))[: draw(st.integers(1, WORLD_SIZE))]
    dtypes = {"forward_dtype": draw(_wire), "backward_dtype": draw(_wire)}
    even, deduplicate = draw(st.booleans()), draw(st.booleans())
    match draw(st.sampled_from(["row_wise", "column_wise", "table_wise", "grid", "replicated"])):
        case "row_wise":
            cuts = None if even else draw(cuts_of(spec.num_rows, len(owners)))
            return row_wise(spec, owners, cuts=cuts, deduplicate=deduplicate, **dtypes)
        case "column_wise":
            cuts = None if even else draw(cuts_of(spec.row_dim, len(owners)))
            return column_wise(spec, owners, cuts=cuts, **dtypes)
        case "table_wise":
            cuts = None if even else draw(cuts_of(spec.num_rows, len(owners), stride))
            return table_wise(spec, owners, stride, cuts=cuts, **dtypes)
        case "grid":
            num_hosts, ranks = draw(st.sampled_from([(1, 6), (2, 3), (3, 2), (2, 1)]))
            slots = draw(st.sampled_from([0, stride]))
            return grid(spec, num_hosts, ranks, code_stride=slots, deduplicate=deduplicate, **dtypes)
    return replicated(spec, backward_dtype=dtypes["backward_dtype"])


sharding_plans = st.lists(st.booleans(), max_size=4).flatmap(
    lambda names: st.tuples(*(table_plans(f"t{index}") for index in range(len(names)))).map(
        lambda tables: ShardingPlan(WORLD_SIZE, tables)
    )
)

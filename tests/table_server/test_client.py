"""RemoteTable against real servers: the suite of all tables, and what only it promises."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfdist import LocalTable, RowAdagrad, RowAdam, RowSGD
from mfdist.errors import ConfigError, ConsistencyError, UnavailableError
from mfdist.sharding import kinds
from mfdist.sharding.table_plan import TablePlan
from mfdist.spec import TableSpec
from mfdist.table import Table
from mfdist.table_server.client import RemoteTable
from mfdist.table_server.connection import TableServers
from mfdist.testing.fused_conformance import FusedConformance
from mfdist.testing.server_processes import ServerProcesses
from mfdist.testing.table_conformance import TableConformance

_number = iter(range(10**9))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcesses]:
    with ServerProcesses(tmp_path_factory.mktemp("servers"), 2) as started:
        yield started


@pytest.fixture
def servers(processes: ServerProcesses) -> Iterator[TableServers]:
    with TableServers(processes.addresses, deadline_s=100) as connected:
        yield connected


def planned(kind: str, spec: TableSpec) -> TablePlan:
    """Return a plan for two servers, or for one where the table is too small to be cut so."""
    match kind:
        case "whole":
            return kinds.row_wise(spec, [1])
        case "row_wise":
            cut = (spec.num_rows + 1) // 3
            return kinds.row_wise(spec, 2, cuts=(0, cut, spec.num_rows))
        case "table_wise" if spec.num_rows % 16 == 0:
            return kinds.table_wise(spec, 2, 16)
        case "column_wise" if spec.row_dim > 1:
            return kinds.column_wise(spec, 2)
    return kinds.row_wise(spec, [0])


class Remote:
    """What the suites need of a remote table."""

    kind = "whole"

    @pytest.fixture(autouse=True)
    def _connect(self, servers: TableServers) -> Iterator[None]:
        self.servers, self.names = servers, list[str]()
        yield
        for name in self.names:
            servers.drop(name)

    def make_table(self, rows: Tensor) -> Table:
        spec = TableSpec(name=f"t{next(_number)}", num_rows=rows.shape[0], row_dim=rows.shape[1], dtype=rows.dtype)
        table = RemoteTable(planned(self.kind, spec), self.servers)
        self.names.append(spec.name)
        table.load_rows(rows)
        return table

    def rows_of(self, table: RemoteTable) -> Tensor:
        return table.rows()

    def states_of(self, table: RemoteTable) -> list[Tensor]:
        return list(table.states().values())


class Conformance(Remote, TableConformance):
    """Rows' gradients are seen as Adam's first moment, with no memory and no rate."""

    def make_table(self, rows: Tensor) -> Table:
        return super().make_table(rows).fuse(RowAdam(lr=0.0, betas=(0.0, 0.0)))

    def rows_gradient(self, table: Table) -> Tensor:
        assert isinstance(table, RemoteTable)
        return table.states()["exp_avg"]


class TestWhole(Conformance):
    kind = "whole"


class TestRowWise(Conformance):
    kind = "row_wise"


class TestTableWise(Conformance):
    kind = "table_wise"


class TestColumnWise(Conformance):
    kind = "column_wise"


class Fused(Remote, FusedConformance):
    def rows_gradient(self, table: Table) -> Tensor:
        raise AssertionError("rows of a remote table that is not fused are frozen")

    def test_a_fused_table_needs_no_gradient_of_its_scores_and_keeps_none_of_its_own(self) -> None:
        """Ids known beforehand train the rows too; unfused again, rows are frozen."""
        table = self.make_table(torch.randn(6, 8)).fuse(RowSGD(lr=0.5))
        assert isinstance(table, RemoteTable)
        before = table.rows()
        table(torch.tensor([[1, 4]]), torch.ones(1, 2)).sum().backward()
        after = table.rows()
        assert torch.equal(after[[1, 4]], before[[1, 4]] - 0.5) and torch.equal(after[[0, 2]], before[[0, 2]])
        scores = torch.ones(1, 2, requires_grad=True)
        table.fuse(None)(torch.tensor([[1, 4]]), scores).sum().backward()
        assert torch.equal(table.rows(), after)
        assert scores.grad is not None
        torch.testing.assert_close(scores.grad, after[[1, 4]].sum(1)[None])


class TestFusedWhole(Fused):
    kind = "whole"


class TestFusedTableWise(Fused):
    kind = "table_wise"


def test_whole_and_column_wise_tables_train_to_the_bits_of_a_local_one(servers: TableServers) -> None:
    """Outputs, gradients of scores and rows, over steps that each depend on the last."""
    for kind, state_dtype in itertools.product(("whole", "column_wise"), (torch.float32, torch.uint8)):
        spec = TableSpec(name=f"bits-{kind}-{state_dtype.itemsize}", num_rows=4 * 16, row_dim=96)
        torch.manual_seed(0)
        optimizer = RowAdam(lr=0.1, state_dtype=state_dtype)
        local = LocalTable(spec, fuse=optimizer)
        remote = RemoteTable(planned(kind, spec), servers, seed=local.seed, fuse=optimizer)
        assert torch.equal(remote.rows(), local.weight)
        for _ in range(3):
            codes, values = torch.randint(0, 16, (200, 4), dtype=torch.uint8), torch.randn(200, 4)
            made = []
            for table in (local, remote):
                scores = values.clone().requires_grad_()
                out = table(codes, scores, code_stride=16)
                out.backward(out.detach().cos())
                made.append((out.detach(), scores.grad))
            assert torch.equal(made[0][0], made[1][0])
            if kind == "whole":  # sums over columns are made in another order where these are cut
                assert made[0][1] is not None and made[1][1] is not None
                assert torch.equal(made[0][1], made[1][1])
        assert torch.equal(remote.rows(), local.weight)
        assert local.row_state is not None
        for name, state in remote.states().items():
            assert state.dtype == state_dtype and torch.equal(state, local.row_state.tensors[name])


def test_traffic_in_bf16_and_fp8_is_near(servers: TableServers) -> None:
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float8_e4m3fn, 1e-1)):
        spec = TableSpec(name=f"wire-{next(_number)}", num_rows=64, row_dim=32)
        exact = RemoteTable(kinds.row_wise(spec, [0]), servers, seed=1, fuse=RowSGD(lr=1.0))
        plan = kinds.row_wise(
            TableSpec(name=f"wire-{next(_number)}", num_rows=64, row_dim=32),
            [1],
            forward_dtype=dtype,
            backward_dtype=dtype,
        )
        narrow = RemoteTable(plan, servers, seed=1, fuse=RowSGD(lr=1.0))
        ids, values = torch.randint(0, 64, (30, 3)), torch.randn(30, 3)
        outs = []
        for table in (exact, narrow):
            out = table(ids, values)
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
            outs.append(out.detach())
        assert (outs[0] - outs[1]).abs().max() <= tolerance * outs[0].abs().max()
        difference = (exact.rows() - narrow.rows()).abs().max()
        assert 0 < difference <= tolerance * 30


def test_lookups_larger_than_a_message_arrive_in_blocks(servers: TableServers) -> None:
    """5000 tokens of 512 columns are 10 MB up and 10 MB down."""
    spec = TableSpec(name="large", num_rows=300, row_dim=512)
    remote = RemoteTable(planned("row_wise", spec), servers, seed=5, fuse=RowSGD(lr=0.1))
    rows, ids, values = remote.rows(), torch.randint(0, 300, (5000, 4)), torch.randn(5000, 4)
    out = remote(ids, values)
    torch.testing.assert_close(out, (rows[ids] * values[..., None]).sum(1))
    out.backward(torch.ones_like(out))
    gradient = torch.zeros(300).index_add_(0, ids.flatten(), values.flatten())
    torch.testing.assert_close(remote.rows(), rows - 0.1 * gradient[:, None], rtol=1e-4, atol=1e-4)


def test_a_prefetched_lookup_is_taken_over_unless_rows_have_changed(servers: TableServers) -> None:
    spec = TableSpec(name="ahead", num_rows=16, row_dim=8)
    remote = RemoteTable(planned("whole", spec), servers, fuse=RowSGD(lr=0.5))
    ids, values = torch.randint(0, 16, (4, 2)), torch.randn(4, 2)
    with torch.no_grad():
        plain = remote(ids, values)
        remote.prefetch(ids, values)
        assert torch.equal(remote(ids, values), plain)
    remote.prefetch(ids, values)
    other = values.clone()
    remote(ids, other).sum().backward()
    remote.prefetch(ids, values)
    out = remote(ids, values)
    torch.testing.assert_close(out, (remote.rows()[ids] * values[..., None]).sum(1))
    assert not torch.equal(out, plain)


def test_a_step_needs_all_clients_and_is_the_mean_of_their_losses(processes: ServerProcesses) -> None:
    """Two clients are as one that has both batches and takes the mean; the order of arrival makes no difference."""
    spec = TableSpec(name="shared", num_rows=32, row_dim=16)
    ids, values = torch.randint(0, 32, (2, 20, 3)), torch.randn(2, 20, 3)
    ends = []
    for order in ((0, 1), (1, 0)):
        with (
            TableServers(processes.addresses, client=0, num_clients=2, deadline_s=60) as zero,
            TableServers(processes.addresses, client=1, num_clients=2, deadline_s=60) as one,
        ):
            named = TableSpec(name=f"shared{order[0]}", num_rows=32, row_dim=16)
            plan = planned("whole", named)
            tables = [RemoteTable(plan, client, seed=9, fuse=RowAdagrad(lr=0.1)) for client in (zero, one)]
            outs = [table(ids[index], values[index]) for index, table in enumerate(tables)]
            pushes = []
            for index in order:
                grad = torch.full((20, 16), 0.05)
                parts = _parts(tables[index], ids[index], values[index])
                pushes.append(tables[index].servers.submit(tables[index]._push(parts, grad / 2, 0.1)))
            for push in pushes:
                push.result(60)
            ends.append(tables[0].rows())
            assert torch.equal(tables[1].rows(), ends[-1])
            assert outs[0].shape == outs[1].shape
    assert torch.equal(ends[0], ends[1])
    torch.manual_seed(0)
    local = LocalTable(spec)
    with torch.no_grad():
        from mfdist.tables.initial_rows import draw_rows

        draw_rows(local.weight, spec, spec.region, 0.02, 9)
    local.fuse(RowAdagrad(lr=0.1))
    out = local(ids.view(40, 3), values.view(40, 3))
    out.backward(torch.full((40, 16), 0.025))
    assert torch.equal(ends[0], local.weight)


def _parts(table: RemoteTable, ids: Tensor, values: Tensor) -> list[object]:
    from mfdist.table_server.routing import parts_of

    return list(parts_of(table.plan, ids, values, 0))


def test_a_late_client_is_named(processes: ServerProcesses) -> None:
    with TableServers(processes.addresses, client=0, num_clients=3, deadline_s=2) as servers:
        spec = TableSpec(name="late", num_rows=8, row_dim=4)
        table = RemoteTable(planned("whole", spec), servers, fuse=RowSGD(lr=0.1))
        out = table(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
        with pytest.raises(UnavailableError, match=r"late: client 1, 2"):
            out.sum().backward()
        servers.drop("late")


def test_whose_rows_another_client_replaced_is_told_so_and_what_to_do(
    processes: ServerProcesses, servers: TableServers, tmp_path: Path
) -> None:
    spec = TableSpec(name="taken", num_rows=16, row_dim=4, dtype=torch.float32)
    table = RemoteTable(planned("whole", spec), servers, std=1.0, seed=1, fuse=RowSGD(lr=0.1))

    def step() -> None:
        scores = torch.ones(2, 1, requires_grad=True)
        table(torch.tensor([[1], [2]]), scores).sum().backward()
        servers.flush()

    step()
    servers.save(str(tmp_path / "run"), 1)
    with TableServers(processes.addresses, deadline_s=100) as others:
        others.load(str(tmp_path / "run"))
    with pytest.raises(ConsistencyError, match=r"another client has loaded a checkpoint into .*; stop .*--resume"):
        step()


def test_what_does_not_fit_is_refused_in_one_line(processes: ServerProcesses, servers: TableServers) -> None:
    spec = TableSpec(name="fits", num_rows=8, row_dim=4)
    with pytest.raises(ConfigError, match="row-wise Adagrad needs whole rows"):
        RemoteTable(kinds.column_wise(spec, 2), servers, fuse=RowAdagrad(lr=0.1))
    with pytest.raises(ConfigError, match="owners"):
        RemoteTable(kinds.row_wise(spec, 3), servers)
    with pytest.raises(ConfigError, match="replicated"):
        RemoteTable(kinds.replicated(spec), servers)
    RemoteTable(planned("whole", spec), servers, seed=1)
    with pytest.raises(ConsistencyError, match="a table is made once"):
        RemoteTable(planned("whole", TableSpec(name="fits", num_rows=9, row_dim=4)), servers, seed=1)
    with pytest.raises(ConfigError, match="address of its own"):
        TableServers([processes.addresses[0]] * 2)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1\b"):
        TableServers(["127.0.0.1:1"], deadline_s=1)


def test_a_server_that_is_not_there_is_told_of_before_the_deadline(
    processes: ServerProcesses, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnavailableError):
        TableServers([processes.addresses[0], "127.0.0.1:1"], deadline_s=6)
    told = [record.getMessage() for record in caplog.records if record.name == "mfdist.table_server.connection"]
    assert told == ["waiting for server 127.0.0.1:1 (connection refused), up to 6 s (servers.deadline_s)"]


def test_copies_are_refused_rather_than_shared(servers: TableServers) -> None:
    table = RemoteTable(planned("whole", TableSpec(name="copied", num_rows=8, row_dim=4)), servers)
    with pytest.raises(TypeError):
        copy.deepcopy(table)

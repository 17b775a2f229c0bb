"""The tables that `mfdist top` shows: as many columns as the terminal has room for, the most telling ones first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mfdist import quantities
from mfdist.launch.server_rates import ServerRates, TableRates

_STYLES = {"serving": "green", "draining": "yellow", "unreachable": "bold red"}
_ROLE_STYLES = {"alone": "yellow", "copying": "yellow"}
_GAP = 2


def shown(servers: Sequence[ServerRates], tables: Sequence[TableRates]) -> RenderableType:
    """Return servers and tables as they are shown, with what is wrong below."""
    problems = [Text(f"{server.address}: {server.problem}", style="red") for server in servers if server.problem]
    parts: list[RenderableType] = [_Fitted(_of_servers(servers))]
    if tables:
        parts += ["", _Fitted(_of_tables(tables))]
    return Group(*parts, *problems)


@dataclass(frozen=True)
class _Column:
    title: str
    cells: list[Text]
    rank: int  # columns with a higher one are left out first
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        return max(len(self.title), *(len(cell) for cell in self.cells))


class _Fitted:
    """Columns side by side, without those for which there is no room."""

    def __init__(self, columns: list[_Column]) -> None:
        self._columns = columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept: set[str] = set()
        left = options.max_width + _GAP
        for column in sorted(self._columns, key=lambda column: column.rank):
            left -= column.width + _GAP
            if left < 0 and kept:
                break
            kept.add(column.title)
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
        columns = [column for column in self._columns if column.title in kept]
        for column in columns:
            table.add_column(column.title, justify=column.justify, no_wrap=True, overflow="ellipsis")
        for cells in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*cells)
        yield table


def _of_servers(servers: Sequence[ServerRates]) -> list[_Column]:
    def column(title: str, rank: int, cells: list[str]) -> _Column:
        return _Column(title, [Text(cell) for cell in cells], rank)

    roles = [Text(server.role or "–", _ROLE_STYLES.get(server.role or "", "")) for server in servers]
    saved = [f"{quantities.duration(s.checkpoint_age_s)} ago" if not s.problem else "" for s in servers]
    return [
        _Column("server", [Text(server.address) for server in servers], 0, "left"),
        _Column("state", [Text(server.state, _STYLES[server.state]) for server in servers], 1, "left"),
        *([_Column("role", roles, 2, "left")] if any(str(role) not in ("–", "single") for role in roles) else []),
        column("requests/s", 2, [_count(server.requests_per_s) for server in servers]),
        column("errors/s", 6, [_count(server.errors_per_s) for server in servers]),
        column("refused/s", 13, [_count(server.refusals_per_s) for server in servers]),
        column("in/s", 5, [_bytes(server.request_bytes_per_s) for server in servers]),
        column("out/s", 5, [_bytes(server.reply_bytes_per_s) for server in servers]),
        column("in flight", 9, [quantities.count(server.in_flight) for server in servers]),
        column("queue", 7, [quantities.count(server.queue_depth) for server in servers]),
        column("Lookup p50/p99", 3, [_latency(server.latency_s.get("Lookup")) for server in servers]),
        column("Push p50/p99", 4, [_latency(server.latency_s.get("Push")) for server in servers]),
        column("log", 10, [quantities.num_bytes(server.log_bytes) for server in servers]),
        column("log lag", 8, [quantities.num_bytes(server.log_pending_bytes) for server in servers]),
        column("saved", 11, saved),
        column("memory", 12, [quantities.num_bytes(server.resident_bytes) for server in servers]),
    ]


def _of_tables(tables: Sequence[TableRates]) -> list[_Column]:
    def column(title: str, rank: int, cells: list[str]) -> _Column:
        return _Column(title, [Text(cell) for cell in cells], rank)

    lags = [quantities.count(table.replica_lag) for table in tables]
    names = [_shortened(quantities.printable(table.table).replace("\n", " ")) for table in tables]
    return [
        _Column("table", [Text(name) for name in names], 0, "left"),
        _Column("server", [Text(table.address) for table in tables], 3, "left"),
        column("version", 1, [str(table.version) for table in tables]),
        column("updates/s", 4, [_count(table.updates_per_s) for table in tables]),
        column("unsaved", 8, [quantities.count(table.checkpoint_lag) for table in tables]),
        *([column("replica lag", 7, lags)] if any(table.replica_lag for table in tables) else []),
        column("rows", 5, [quantities.count(table.num_rows) for table in tables]),
        column("columns", 9, [str(table.row_dim) for table in tables]),
        column("memory", 7, [quantities.num_bytes(table.num_bytes) for table in tables]),
        column("row hits/s", 2, [_count(table.row_hits_per_s) for table in tables]),
        column("row hits", 6, [quantities.count(table.row_hits) for table in tables]),
    ]


def _shortened(name: str, width: int = 40) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _count(value: float | None) -> str:
    return "–" if value is None else quantities.count(value)


def _bytes(value: float | None) -> str:
    return "–" if value is None else quantities.num_bytes(value)


def _latency(latency: tuple[float, float] | None) -> str:
    """Return p50 and p99 in milliseconds."""
    return "–" if latency is None else f"{latency[0] * 1000:.3g}/{latency[1] * 1000:.3g} ms"

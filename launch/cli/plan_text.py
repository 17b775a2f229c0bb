"""A plan as text: what it needs, what each table costs and why, and a drawing of ranks × tables."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mfdist import quantities

#: How a rank's part of a table is drawn.
MARKS = {
    "row_wise": "▤",
    "row_wise, pooled": "▨",
    "column_wise": "▥",
    "table_wise": "▧",
    "grid of rows": "▦",
    "grid of pooled rows": "▣",
    "grid of slots": "▩",
    "replicated": "■",
}
_NOTHING = "·"
_WIDEST = 64  # ranks drawn one by one
_BAR = 20


def lines(document: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a decision, as `mfdist.launch.planning.describe` gives it."""
    hosts = document["num_hosts"]
    yield (
        f"{document['name']}: {len(document['tables'])} tables on {document['world_size']:,} ranks, "
        f"{hosts:,} host{'' if hosts == 1 else 's'}, {document['batch_tokens']:,} tokens a step"
    )
    yield from _memory(document)
    yield from _time(document)
    groups = _groups(document["tables"])
    yield ""
    yield from _tables(groups)
    yield ""
    yield from _drawing(groups, document["world_size"])
    if document["advice"]:
        yield ""
        yield from _advice(document["advice"])


def growth(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what grows with the ranks, the work or only the speed, and a line for each world size."""
    fewest, most = documents[0], documents[-1]
    tokens = fewest["batch_tokens"]
    if tokens == most["batch_tokens"]:
        yield f"strong scaling: {tokens:,} tokens a step at every size"
    else:
        yield f"weak scaling: {tokens // fewest['world_size']:,} tokens a rank at every size"
    yield f"{'ranks':>7}{'hosts':>7}{'a rank':>11}{'fits':>6}{'step':>10}{'tokens/s':>10}{'efficiency':>12}  kinds"
    for document in documents:
        size, step_s = document["world_size"], document["step_s"]
        # Tokens a second and rank, against those of the fewest ranks.
        efficiency = (document["batch_tokens"] / step_s / size) / (tokens / fewest["step_s"] / fewest["world_size"])
        kinds = list(dict.fromkeys(table["description"] for table in document["tables"]))
        yield (
            f"{size:>7,}{document['num_hosts']:>7,}{quantities.num_bytes(max(document['rank_bytes'])):>11}"
            f"{'yes' if document['fits'] else 'NO':>6}{_seconds(step_s):>10}"
            f"{quantities.count(document['batch_tokens'] / step_s):>10}{quantities.share(efficiency):>12}"
            f"  {', '.join(kinds)}"
        )


def _memory(document: dict[str, Any]) -> Iterator[str]:
    fullest = max(document["rank_bytes"])
    usable = document["usable_bytes"]
    verdict = "fits" if document["fits"] else "DOES NOT FIT"
    parts = {
        name: sum(max(ranks[key] for ranks in table["ranks"]) for table in document["tables"])
        for name, key in (
            ("rows", "weight_bytes"),
            ("gradients", "gradient_bytes"),
            ("states", "state_bytes"),
            ("kept for backward", "saved_bytes"),
        )
    }
    parts["exchange buffers"] = document["buffer_bytes"]
    parts["all the rest"] = document["dense_bytes"]
    told = ", ".join(f"{name} {quantities.num_bytes(size)}" for name, size in parts.items() if size)
    filled = round(_BAR * min(1.0, fullest / usable))
    bar = "█" * filled + "░" * (_BAR - filled)
    yield (
        f"{verdict}: {bar} {quantities.num_bytes(fullest)} of {quantities.num_bytes(usable)} usable on the fullest rank"
        f", {quantities.num_bytes(min(document['rank_bytes']))} on the emptiest"
    )
    yield f"  {told}"


def _time(document: dict[str, Any]) -> Iterator[str]:
    parts = {
        name: sum(table[key] for table in document["tables"])
        for name, key in (
            ("lookups", "lookup_s"),
            ("exchanges", "exchange_s"),
            ("updates", "update_s"),
            ("waiting for hosts", "host_s"),
        )
    }
    parts["all the rest"] = document["dense_s"]
    told = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts.items() if seconds)
    rate = quantities.count(document["batch_tokens"] / document["step_s"])
    yield f"predicted step: {_seconds(document['step_s'])}, {rate} tokens/s ({told})"


def _groups(tables: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return tables that differ in nothing but a number in their names together, named with a star for it."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for table in tables:
        name = re.sub(r"\d+", "*", table["name"], count=1)
        found.setdefault((name, table["description"], table["reason"]), []).append(table)
    return [
        (f"{name} ×{len(group)}" if len(group) > 1 else group[0]["name"], group)
        for (name, _, _), group in found.items()
    ]


def _tables(groups: Sequence[tuple[str, list[dict[str, Any]]]]) -> Iterator[str]:
    width = max(len("table"), *(len(name) for name, _ in groups))
    wide = max(13, *(len(group[0]["description"]) + 1 for _, group in groups))
    yield f"{'table':<{width}}  {'kind':<{wide}}{'a rank':>10}{'sent a step':>13}{'time':>10}  why"
    for name, group in groups:
        table = group[0]
        ranks = table["ranks"]
        kept = ("weight_bytes", "gradient_bytes", "state_bytes", "saved_bytes")
        size = max(sum(part[key] for key in kept) for part in ranks)
        sent = max(part["sent_forward_bytes"] + part["sent_backward_bytes"] for part in ranks)
        step_s = sum(table[key] for key in ("lookup_s", "exchange_s", "update_s", "host_s"))
        yield (
            f"{name:<{width}}  {table['description']:<{wide}}{quantities.num_bytes(size):>10}"
            f"{quantities.num_bytes(sent):>13}{_seconds(step_s):>10}  {table['reason']}"
        )


def _drawing(groups: Sequence[tuple[str, list[dict[str, Any]]]], world_size: int) -> Iterator[str]:
    width = max(len("ranks"), *(len(name) for name, _ in groups))
    each = -(-world_size // _WIDEST)
    cells = -(-world_size // each)
    scale = (
        "".join(str(cell // 10 % 10) if cell % 10 == 0 else "-" for cell in range(cells)) if each == 1 else "-" * cells
    )
    yield f"{'ranks':<{width}}  {scale}" + (f"  a cell is {each} ranks" if each > 1 else "")
    used = {}
    for name, group in groups:
        table = group[0]
        mark = used[table["description"]] = MARKS[table["description"]]
        idle = sum(part["num_ranks"] for part in table["ranks"] if not part["rows"] * part["columns"])
        filled = cells - round(idle / each)
        yield f"{name:<{width}}  {mark * filled}{_NOTHING * (cells - filled)}"
    yield "  ".join(f"{mark} {kind}" for kind, mark in used.items())


def _advice(advice: dict[str, Any]) -> Iterator[str]:
    unplaced = advice["unplaced"]
    yield f"{quantities.num_bytes(advice['missing_bytes'])} too much a rank; without room are {len(unplaced)} tables:"
    for table in unplaced[:5]:
        yield f"  {table['name']}: {quantities.num_bytes(table['rank_bytes'])} a rank"
    if len(unplaced) > 5:
        yield f"  and {len(unplaced) - 5} more"
    yield "changes that were tried:"
    for change in advice["changes"]:
        verdict = "fits" if change["fits"] else "not enough"
        yield f"  {verdict:<10}  {change['what']}: {quantities.num_bytes(change['rank_bytes'])}"


def _seconds(seconds: float) -> str:
    if seconds >= 10:
        return quantities.duration(seconds)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"

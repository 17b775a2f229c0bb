"""Explanations: why each table is split as it is, in a sentence, and what everything adds up to."""

from dataclasses import dataclass

from mfdist.sharding.advice import size
from mfdist.sharding.cost import TableCost
from mfdist.sharding.planner import Decision

_PARTS = (
    ("exchange_s", "exchanges"),
    ("lookup_s", "lookups"),
    ("update_s", "updates"),
    ("host_s", "waiting for the host"),
)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why one table is split as it is.

    Args:
        cost: of the table as planned.
        options: what it could have been, fastest first, one of each kind.
        reason: a sentence.
    """

    cost: TableCost
    options: tuple[TableCost, ...]
    reason: str


def explain(decision: Decision) -> list[Explanation]:
    """Return an explanation of each table, in the plan's order."""
    found = []
    for cost, priced in zip(decision.cost.tables, decision.options, strict=True):
        options = _one_of_each(priced)
        found.append(Explanation(cost=cost, options=options, reason=_reason(cost, options)))
    return found


def described(cost: TableCost) -> str:
    """Return a plan's kind, and what of it the kind does not say."""
    plan = cost.plan
    if plan.kind == "grid":
        return f"grid of {'slots' if plan.code_stride else 'pooled rows' if plan.pooled else 'rows'}"
    return f"{plan.kind}, pooled" if plan.pooled else plan.kind


def _one_of_each(priced: tuple[TableCost, ...]) -> tuple[TableCost, ...]:
    found: dict[str, TableCost] = {}
    for cost in priced:
        found.setdefault(described(cost), cost)
    return tuple(found.values())


def _reason(cost: TableCost, options: tuple[TableCost, ...]) -> str:
    chosen = described(cost)
    others = [option for option in options if described(option) != chosen]
    if cost.held.world_size == 1:
        return "there is one rank, which holds everything"
    if not others:
        return "there is no other kind for this table"
    best = others[0]
    if best.step_s < cost.step_s:
        more = best.lasting_bytes - cost.lasting_bytes
        lost = f"{_ms(cost.step_s - best.step_s)} slower than {described(best)}"
        if more > 0:
            return f"{lost}, which needs {size(more)} more a rank"
        return f"{lost}, whose buffers need {size(best.buffer_bytes)} at once against {size(cost.buffer_bytes)}"
    ratio = best.step_s / cost.step_s if cost.step_s else 1.0
    part, name = max(_PARTS, key=lambda part: getattr(best, part[0]) - getattr(cost, part[0]))
    spent = f"{_ms(getattr(best, part))} in {name} against {_ms(getattr(cost, part))}"
    return f"next best is {described(best)}, {ratio:.2f}× as long: {spent}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

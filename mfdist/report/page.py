"""The page: one HTML file with everything in it, which asks nobody for anything."""

import base64
import copy
import json
import re
import time
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from mfdist import quantities
from mfdist.errors import ConfigError
from mfdist.report.words import model_line

Document = dict[str, Any]

#: Hits are drawn as powers of two around even ones; what lies beyond is drawn as the last.
_OCTAVES = 5.0
#: Checkpoints that are listed; of more, the first and the latest.
_MAX_CHECKPOINTS = 16


def page(document: Document, live_every_ms: int = 0) -> str:
    """Return the HTML of a report.

    Args:
        document: from `Report.document`.
        live_every_ms: how often the page asks its server for what is new; 0: never, it is a file.

    Raises:
        ConfigError: plotly or jinja2 are missing.
    """
    template = _environment().get_template("page.html.j2")
    made: str = template.render(
        **_content(document),
        css=_asset("page.css"),
        theme_script=_asset("theme.js"),
        charts_script=_asset("charts.js"),
        page_script=_asset("page.js"),
        plotly=_plotly(),
        # No "<" in a string can end the element that the document stands in.
        document=json.dumps(_for_page(document), allow_nan=False, separators=(",", ":")).replace("<", r"\u003c"),
        is_live=live_every_ms > 0,
        live_every_ms=live_every_ms,
        made=moment(document["made"]),
        version=document["mfdist"],
    )
    return made


def update(document: Document) -> Document:
    """Return what a live page takes over: its main part, and what its charts draw."""
    html = _environment().get_template("main.html.j2").render(**_content(document), is_live=True)
    return {"html": html, "document": _for_page(document)}


def moment(seconds: float) -> str:
    """Return a time in seconds since 1970 as people write it, in the zone of this machine."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def _content(document: Document) -> dict[str, Any]:
    """Return what the templates show, besides the charts."""
    run = document["runs"][0]
    sections = [("summary", "Summary")]
    if run["step"]:
        sections += [("learning", "Learning"), ("speed", "Speed and memory")]
    if run["tables"]:
        sections.append(("tables", "Table use"))
    if run["plan"]:
        sections.append(("plan", "Plan"))
    if run["checkpoints"]:
        sections.append(("checkpoints", "Checkpoints"))
    sections.append(("configuration", "Configuration"))
    detail = run["tables"] and run["tables"]["detail"]
    return {
        "run": run,
        "runs": document["runs"],
        "sections": sections,
        "section_ids": {id_ for id_, _ in sections},
        "model_line": model_line(run),
        "summary": document["summary"],
        "findings": document["findings"],
        "figures": document["figures"],
        "comparison": [_compared(each) for each in document["runs"]],
        "has_bands": "low" in run["steps"]["curves"]["loss"],
        "time_run": _bars(run["time"]["run"], "seconds", quantities.duration),
        "time_step": _bars(run["time"]["step"], "share", lambda _: ""),
        "has_detail": bool(detail),
        "layers": [layer["name"] for layer in detail["layers"]] if detail else [],
        "worst_layer": _worst(run) if detail else "",
        **_plan(run["plan"]),
        **_checkpoints(run["checkpoints"]),
    }


def _compared(run: Document) -> dict[str, str]:
    scored = run["evaluations"][-1]["bits_per_byte"] if run["evaluations"] else None
    losses = run["steps"]["curves"]["loss"]["mean"]
    return {
        "label": run["label"],
        "kind": "MemoryFormer" if run["kind"] == "memory" else "dense",
        "steps": f"{run['step']:,}",
        "bits_per_byte": "–" if scored is None else f"{scored:.3f}",
        "loss": "–" if not losses or losses[-1] is None else f"{losses[-1]:.3f}",
        "speed": quantities.count(run["tokens_per_s"]) if run["tokens_per_s"] else "–",
        "memory": quantities.num_bytes(run["peak_memory_bytes"]) if run["peak_memory_bytes"] else "–",
    }


def _bars(parts: list[dict[str, Any]], key: str, shown: Any) -> list[dict[str, Any]]:
    total, most = sum(part[key] for part in parts), max((part[key] for part in parts), default=0)
    return [
        {
            "name": part["name"],
            "share": part[key] / most,
            "value": shown(part[key]),
            "percent": f"{part[key] / total:.1%}",
        }
        for part in parts
        if most
    ]


def _worst(run: Document) -> str:
    """Return the layer whose codes carry least: the one to look at first."""
    layers = run["tables"]["history"][-1]["layers"]
    names = {layer["name"] for layer in run["tables"]["detail"]["layers"]}
    known = [use for use in layers if use["name"] in names]
    if not known:
        return str(run["tables"]["detail"]["layers"][0]["name"])
    return str(min(known, key=lambda use: use["code_entropy"] / (use["even_code_entropy"] or 1.0))["name"])


def _plan(plan: Document | None) -> dict[str, Any]:
    if plan is None:
        return {"plan_line": "", "plan_tables": [], "plan_memory": []}
    total = sum(table["num_bytes"] for table in plan["tables"])
    read = sum(table["rows_read"] for table in plan["tables"])
    line = f"{len(plan['tables'])} tables, {quantities.num_bytes(total)} of rows; a token reads {read:,} of them"
    if plan["num_holders"] > 1:
        kinds = sorted({table["kind"].replace("_", "-") for table in plan["tables"]})
        chosen = ", chosen by the planner" if plan["is_chosen"] else ""
        hosts = f" of {plan['num_hosts']} hosts" if plan["num_hosts"] > 1 else ""
        line += f". On {plan['num_holders']:,} {plan['holders']}s{hosts}: {', '.join(kinds)}{chosen}"
        if len(plan["shown"]) < plan["num_holders"]:
            line += f"; {len(plan['shown'])} of them are drawn"
    else:
        line += f". One {plan['holders']} holds them all"
    groups: dict[str, int] = {}
    for table in plan["tables"]:
        group = re.sub(r"\.\d+\.", ".*.", table["name"])
        groups[group] = groups.get(group, 0) + table["num_bytes"]
    memory = [{"name": part["name"], "bytes": part["bytes"][0]} for part in plan["memory"]]
    return {
        "plan_line": line + ".",
        "plan_tables": _bars(
            [{"name": name, "bytes": size} for name, size in groups.items()], "bytes", quantities.num_bytes
        ),
        "plan_memory": _bars(memory, "bytes", quantities.num_bytes),
    }


def _checkpoints(saves: list[Document]) -> dict[str, Any]:
    shown = saves if len(saves) <= _MAX_CHECKPOINTS else [saves[0], *saves[1 - _MAX_CHECKPOINTS :]]
    kept = sum(bool(save["is_there"]) for save in saves)
    line = f"{len(saves)} {'checkpoint was' if len(saves) == 1 else 'checkpoints were'} committed"
    if saves and saves[0]["is_there"] is not None:
        line += f", {kept} {'is' if kept == 1 else 'are'} still there"
    if len(shown) < len(saves):
        line += f"; the first and the last {len(shown) - 1} are listed"
    words = {None: "in the object store", True: "yes", False: "removed"}
    return {
        "checkpoints_line": line + ".",
        "checkpoints": [
            {
                "step": f"{save['step']:,}",
                "size": quantities.num_bytes(save["num_bytes"]),
                "written": "–" if save["written_bytes"] is None else quantities.num_bytes(save["written_bytes"]),
                "took": quantities.duration(save["save_s"]),
                "waited": "–" if save["stall_s"] is None else quantities.duration(save["stall_s"]),
                "kept": words[save["is_there"]],
            }
            for save in shown
        ],
    }


def _for_page(document: Document) -> Document:
    """Return the document as the charts read it: maps packed into bytes, and without what the page shows as text."""
    made = copy.copy(document)
    run = {key: value for key, value in document["runs"][0].items() if key not in ("config", "sample", "warnings")}
    if run["tables"] and run["tables"]["detail"]:
        detail = run["tables"]["detail"]
        run["tables"] = {
            **run["tables"],
            "detail": {**detail, "layers": [_packed_layer(layer) for layer in detail["layers"]]},
        }
    made["runs"] = [run, *document["runs"][1:]]
    return made


def _packed_layer(layer: Document) -> Document:
    hits = np.log2(np.maximum(np.array(layer["hits"]), 2.0 ** -(_OCTAVES + 1)))
    return {
        **layer,
        "hits": _packed(hits, -_OCTAVES, _OCTAVES),
        "bit_shares": _packed(np.array(layer["bit_shares"]), 0.0, 1.0),
    }


def _packed(lines: Any, low: float, high: float) -> Document:
    """Return lines of numbers as bytes from 0, for `low` or less, to 255, for `high` or more."""
    steps = np.clip((lines - low) / (high - low), 0.0, 1.0) * 255
    content = np.round(steps).astype(np.uint8)
    return {
        "bytes": base64.b64encode(content.tobytes()).decode(),
        "columns": content.shape[1],
        "low": low,
        "high": high,
    }


@cache
def _asset(name: str) -> str:
    return resources.files("mfdist.report").joinpath("assets", name).read_text("utf-8")


@cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise _missing("plotly") from None
    return str(get_plotlyjs())


@cache
def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise _missing("jinja2") from None
    # Only what the package brings is put in as it is; whatever a run says is escaped.
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["moment"] = moment
    return environment


def _missing(package: str) -> ConfigError:
    return ConfigError(f"a report needs the package {package}; pip install 'mfdist[report]'")

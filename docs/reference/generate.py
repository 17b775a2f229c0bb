"""A mkdocs hook: writes references of commands, configurations, errors and the protocol from the code, at every build.

A page holds `<!-- generated: cli -->` or the like where the text goes.
"""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mfdist import errors, table_server
from mfdist.config import RunConfig
from mfdist.launch.cli.app import app
from mfdist.table_server.config import ServerConfig


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page's marker; called by mkdocs for each page."""
    for marker, write in _WRITERS.items():
        place = f"<!-- generated: {marker} -->"
        if place in markdown:
            markdown = markdown.replace(place, "\n".join(write()))
    return markdown


def _configuration() -> Iterator[str]:
    yield from _section(RunConfig, "")


def _table_server() -> Iterator[str]:
    yield from _section(ServerConfig, "")


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    sections, rows = [], []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((f"{prefix}{name}", field.annotation))
        else:
            rows.append(f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |")
    if rows:
        title = f"`[{prefix.rstrip('.')}]`" if prefix else "Top of the file"
        about = (model.__doc__ or "").strip()
        yield from ["", f"## {title}", "", about, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows]
    for path, section in sections:
        yield from _section(section, f"{path}.")


_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _type(field: FieldInfo) -> str:
    annotation, limits = field.annotation, [*field.metadata]
    if get_origin(annotation) in (Union, UnionType):  # X | None, where X may be Annotated
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        limits += [limit for item in more for limit in getattr(item, "metadata", [])]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} numbers"
    signs = [
        f"{sign} {getattr(limit, name):g}"
        for limit in limits
        for name, sign in _SIGNS.items()
        if getattr(limit, name, None) is not None
    ]
    return " ".join([_WORDS[annotation], ", ".join(signs)]).strip()


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    return "" if field.default is None else f"`{_toml(field.default)}`"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _cli() -> Iterator[str]:
    root = typer.main.get_command(app)
    yield from _command(root, "mfdist")


def _command(command: Any, path: str) -> Iterator[str]:
    yield from ["", f"## `{path}`", "", (command.help or "").strip(), ""]
    arguments = [_usage(p) for p in command.params if p.param_type_name == "argument"]
    children = getattr(command, "commands", {})
    usage = [path, *(["COMMAND"] if children else []), *(["[OPTIONS]"] if command.params else []), *arguments]
    yield from ["```text", " ".join(usage), "```", ""]
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    if shown:
        yield from ["| option | meaning | default |", "|---|---|---|"]
        yield from (f"| {_names(p)} | {_cell(p.help or '')} | {_option_default(p)} |" for p in shown)
    if command.epilog:
        yield from ["", command.epilog.strip()]
    for name, child in children.items():
        yield from _command(child, f"{path} {name}")


def _usage(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} `{parameter.metavar or parameter.name.upper()}`"


def _option_default(parameter: Any) -> str:
    if parameter.required:
        return "must be given"
    if parameter.default in (None, False, ()) or callable(parameter.default):
        return ""
    return f"`{parameter.default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _errors() -> Iterator[str]:
    yield from ["| error | also a | kind | exit code | gRPC status | means |", "|---|---|---|---|---|---|"]
    for error in vars(errors).values():
        if not isinstance(error, type) or not issubclass(error, errors.MfdistError) or error is errors.MfdistError:
            continue
        code, status = errors.OUTCOMES[error.kind]
        also = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        meaning = _cell((error.__doc__ or "").strip())
        yield f"| `{error.__name__}` | {also} | `{error.kind}` | {code} | `{status}` | {meaning} |"


def _protocol() -> Iterator[str]:
    yield from ["```protobuf", _PROTOCOL.read_text("utf-8").strip(), "```"]


_PROTOCOL = Path(table_server.__file__).parent / "proto" / "table_v1.proto"
_WRITERS = {
    "cli": _cli,
    "configuration": _configuration,
    "table server": _table_server,
    "errors": _errors,
    "protocol": _protocol,
}

"""What `--keys` prints: a configuration file with every key, its default and its meaning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel


def as_toml(section: "type[BaseModel]", path: str = "") -> Iterator[str]:
    """Yield the lines of a TOML file in which every key has its default; keys without one are commented out.

    Args:
        section: the class of the whole file, or of a part of it.
        path: the part's name in the file; empty for the whole.
    """
    inner: list[tuple[str, type[BaseModel]]] = []
    if path:
        yield from ("", f"[{path}]")
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            inner.append((f"{path}.{name}" if path else name, field.annotation))
            continue
        meaning = field.description or ""
        if get_origin(field.annotation) is Literal:
            meaning += f" (one of {', '.join(json.dumps(option) for option in get_args(field.annotation))})"
        yield f"# {meaning}"
        if field.is_required():
            yield f"# {name} =    (must be given)"
        elif field.default is None:
            yield f"# {name} ="
        else:
            default = str(field.default) if isinstance(field.default, Path) else field.default
            yield f"{name} = {json.dumps(default, ensure_ascii=False)}"
    for name, kind in inner:
        yield from as_toml(kind, name)

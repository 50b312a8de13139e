"""The reference of all settings, made from the schema's own source so that it cannot differ from it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass

from chulengo.config import schema
from chulengo.config.load import describe_type, flatten


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its full name, what it may be, its default and what it does."""

    key: str
    kind: str
    default: str
    meaning: str


def settings() -> list[Setting]:
    """Returns every setting in the order of the schema."""
    defaults = flatten(schema.RunConfig())
    found: list[Setting] = []
    for name, kind in typing.get_type_hints(schema.RunConfig).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found += _of(kind, f"{name}.", defaults)
    return found + [setting for setting in _of(schema.RunConfig, "", defaults) if setting.key in defaults]


def as_text() -> str:
    """Returns the reference as plain text, one setting a paragraph."""
    lines = []
    for setting in settings():
        lines.append(f"{setting.key} = {setting.default}")
        lines.append(f"    {setting.meaning}")
        lines.append(f"    {setting.kind}")
    return "\n".join(lines)


def as_markdown() -> str:
    """Returns the reference as a Markdown table."""
    rows = [f"| `{s.key}` | `{s.default}` | {s.kind} | {s.meaning} |" for s in settings()]
    return "\n".join(["| setting | default | what it may be | meaning |", "|---|---|---|---|", *rows])


def _of(cls: type, prefix: str, defaults: dict[str, object]) -> list[Setting]:
    kinds = typing.get_type_hints(cls)
    comments = dict(re.findall(r"^    (\w+): [^#\n]*?# (.+)$", inspect.getsource(cls), flags=re.MULTILINE))
    return [
        Setting(f"{prefix}{name}", describe_type(kind), _shown(defaults.get(f"{prefix}{name}")), comments.get(name, ""))
        for name, kind in kinds.items()
    ]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value) if value != "" else "''"

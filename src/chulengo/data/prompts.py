"""Prompt templates: a system prompt, a user prompt and an answer written by the user, with `{column}` in them.

A template is data, so it is filled by substitution alone. `str.format` would let a template reach attributes
(`{x.__class__}`) and stumble over values that contain braces; Jinja is a programming language. Here a template is
parsed once into pieces, each text or a column's name, and a value is pasted as it is, never looked at again.
`{{` and `}}` stand for braces.

Values may get names: `labels: {label: {0: negative, 1: positive}}` writes `positive` where the column `label` holds 1,
and a value without a name is an error. Many sets have their classes as bare numbers, which teach a model to answer "1".

Optional columns need no syntax: a paragraph of the template (paragraphs are parted by blank lines) whose columns are
all empty is left out. `{instruction}\\n\\n{input}` is so both Alpaca prompts at once. Limit: there are no conditions
beyond that; data that need more are better prepared as messages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chulengo.errors import ConfigError, DataError, nearest, yaml_fault

_KEYS = ("name", "system", "user", "answer", "labels")
_TEXTS = _KEYS[:-1]
_TEMPLATE_EXAMPLE = """two lines such as  user: "{question}"  and  answer: "{answer}\""""
_PARAGRAPHS = re.compile(r"(\n[ \t]*\n\s*)")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """How the columns of a row become a conversation.

    Attributes:
        name: shown in reports.
        system: the system prompt, or None.
        user: what the user says.
        answer: what the assistant answers.
        labels: column -> value (as text) -> the name that is written for it.
    """

    name: str
    system: str | None
    user: str
    answer: str
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in braces, in order of appearance."""
        names = [n for text in (self.system or "", self.user, self.answer) for n in template_columns(text)]
        return tuple(dict.fromkeys(names))


def load_template(path: str | Path) -> PromptTemplate:
    """Returns the template of a YAML file with the keys name, system, user, answer and labels.

    Raises:
        ConfigError: a missing or broken file, unknown or missing keys, braces that do not match.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The prompt template {path} cannot be read: {error.strerror or error}.", allowed="a YAML file",
            next_step=_nearest_template(Path(path).expanduser()),
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The prompt template {path} is not valid YAML: {yaml_fault(error)}.", next_step=_TEMPLATE_EXAMPLE
        ) from error
    return template_from(loaded, f"The prompt template {path}", Path(path).stem)


def template_from(loaded: Any, what: str, name: str) -> PromptTemplate:
    """Returns the template that a YAML mapping describes.

    Args:
        loaded: with the keys name, system, user, answer and labels.
        what: what it is called in errors.
        name: its name, unless it has one.

    Raises:
        ConfigError: unknown or missing keys, values that are no text, braces that do not match.
    """
    if not isinstance(loaded, dict):
        raise ConfigError(f"{what} is not a mapping.", allowed=", ".join(_KEYS), next_step=_TEMPLATE_EXAMPLE)
    problems = [_unknown_key(str(key)) for key in loaded if key not in _KEYS]
    problems += [f"'{key}' is missing" for key in ("user", "answer") if key not in loaded]
    texts = {key: loaded[key] for key in _TEXTS if key in loaded and not (key == "system" and loaded[key] is None)}
    problems += [f"'{key}' must be text" for key, text in texts.items() if not isinstance(text, str)]
    labels = _labels(loaded.get("labels") or {}, problems)
    if problems:
        raise ConfigError(f"{what}: {'; '.join(problems)}.", allowed=", ".join(_KEYS), next_step=_TEMPLATE_EXAMPLE)
    template = PromptTemplate(
        loaded.get("name", name), loaded.get("system"), loaded["user"], loaded["answer"], labels
    )
    if not template_columns(template.answer):
        raise ConfigError(
            f"{what}: 'answer' names no column, so every answer would be the same.", next_step='answer: "{answer}"'
        )
    template_columns(template.user + (template.system or ""))
    return template


def template_columns(text: str) -> list[str]:
    """Returns the column names in one template text, in order.

    Raises:
        ConfigError: a single brace, or empty ones.
    """
    names = []
    for match in _BRACES.finditer(text):
        if match.group() in ("{", "}") or match.group(1) == "":
            raise ConfigError(
                f"A prompt template has a stray '{match.group()}' at character {match.start() + 1}: "
                f"{text[max(0, match.start() - 20) : match.start() + 20]!r}",
                allowed="{column}, and {{ or }} for a brace",
                next_step="close the brace after the column's name, or double it",
            )
        if match.group(1) is not None:
            names.append(match.group(1))
    return names


def fill(text: str, fields: Mapping[str, Any]) -> str:
    """Returns one template text with the columns' values in it (see the top of this file).

    Raises:
        ConfigError: braces that do not match.
        DataError: a column that the row does not have, or whose value is no text.
    """
    pieces = _PARAGRAPHS.split(text)
    filled = ""
    for index in range(0, len(pieces), 2):
        names = template_columns(pieces[index])
        values = {name: as_text(_value(fields, name), name) for name in names}
        if names and not any(values.values()):
            continue
        filled += (pieces[index - 1] if filled else "") + _pasted(pieces[index], values)
    return filled


def named_values(template: PromptTemplate, fields: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names of the values that the template's `labels` name, by column; an empty cell stays empty.

    Raises:
        DataError: a column that the row does not have, or a value without a name.
    """
    named = {}
    for column, names in template.labels.items():
        value = as_text(_value(fields, column), column)
        if value and value not in names:
            raise DataError(
                f"column '{column}' holds '{value}', to which the prompt template's labels give no name",
                allowed=", ".join(names),
            )
        named[column] = names.get(value, "")
    return named


def as_text(value: Any, column: str) -> str:
    """Returns a cell as text: None and NaN as "", numbers and truth values as JSON writes them, lists line by line.

    Raises:
        DataError: the cell holds an object, or bytes.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise DataError(f"column '{column}' holds {type(value).__name__}, not text")


def unknown_column(name: str, known: Mapping[str, Any] | list[str]) -> DataError:
    """Returns the error for a template's column that the data do not have."""
    names = list(known)
    close = nearest(name, names)
    return DataError(
        f"the prompt template names the column '{name}', which the data do not have",
        allowed=", ".join(names),
        next_step=f"write {{{close or names[0]}}} in the template" if names else None,
    )


def _labels(given: Any, problems: list[str]) -> dict[str, dict[str, str]]:
    if not isinstance(given, dict) or not all(isinstance(names, dict) for names in given.values()):
        problems.append("'labels' must be a mapping such as {label: {0: negative, 1: positive}}")
        return {}
    for column, names in given.items():
        # YAML reads yes, no and numbers as what they are, and a name is text
        problems += [f"'labels': the name of {column} {value} must be text (in quotes?), not {name!r}"
                     for value, name in names.items() if not isinstance(name, str)]
    return {str(column): {as_text(value, "labels"): str(name) for value, name in names.items()}
            for column, names in given.items()}


def _nearest_template(path: Path) -> str:
    siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    return f"--set prompt.template={path.parent / close}" if close else f"ls {path.parent}"


def _value(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise unknown_column(name, fields)
    return fields[name]


def _pasted(text: str, values: Mapping[str, str]) -> str:
    return _BRACES.sub(lambda m: m.group()[0] if m.group(1) is None else values[m.group(1)], text)


def _unknown_key(key: str) -> str:
    close = nearest(key, _KEYS)
    return f"unknown key '{key}'" + (f" (did you mean '{close}'?)" if close else "")

"""YAML and overrides to a checked `RunConfig`; every problem is reported at once.

Three sources, later ones win: the defaults in `schema`, one YAML file, overrides (`section.key=value`, the value read
as YAML). Types are checked, never converted, with one exception: `2e-4`, which YAML 1.1 reads as text, is a number
where a number is wanted. Contradictions look at what was *said*, not at defaults: `epochs: 3` beside `max_steps: 100`
is an error, `max_steps: 100` alone is not.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from chulengo.config.rules import contradictions, out_of_range
from chulengo.config.schema import RunConfig
from chulengo.errors import ConfigError, nearest, yaml_fault

SIZES = {"gpu_memory_limit"}  # text in the schema, of which a bare number would be bytes


def load_config(
    file: str | Path | None = None, overrides: Iterable[str] = (), *, saved: bool = False
) -> RunConfig:
    """Returns the configuration of one run.

    Args:
        file: YAML file with the sections of `RunConfig`; None: defaults only.
        overrides: `section.key=value` strings, applied in order.
        saved: the file was written by `to_yaml`, so it says every key, also those that others override.

    Raises:
        ConfigError: names every unknown key (with the nearest known one), wrong type, value out of range and
            contradiction found, all in one message.
    """
    said: dict[str, Any] = _read_yaml(Path(file)) if file is not None else {}
    problems: list[str] = []
    for override in overrides:
        _apply_override(said, override, problems)
    config: RunConfig = _build(RunConfig, said, "", problems)
    problems += out_of_range(config)
    problems += contradictions(config, set() if saved else _said_keys(said))
    if problems:
        where = f" in {file}" if file is not None else ""
        listing = "\n".join(f"  - {problem}" for problem in problems)
        count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(
            f"{count} with the configuration{where}:\n{listing}",
            next_step="chulengo train --help-config   (every key, its default and meaning)",
        )
    return config


def to_yaml(config: RunConfig) -> str:
    """Returns the configuration as YAML text that `load_config` reads back to an equal object."""
    text: str = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    return text


def flatten(config: RunConfig) -> dict[str, Any]:
    """Returns `{"section.key": value}` for every setting, in the order of the schema."""
    flat: dict[str, Any] = {}
    for name, value in _plain(dataclasses.asdict(config)).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        siblings = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        near = nearest(file.name, siblings)
        raise ConfigError(
            f"There is no configuration file {file}.",
            next_step=f"--config {file.parent / near}" if near else f"ls {file.parent}",
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"The configuration file {file} is a folder.", allowed="a YAML file", next_step=f"ls {file}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"The configuration file {file} cannot be read: {reason}.", allowed="a YAML file in UTF-8",
            next_step=f"file {file}   (what it is)",
        ) from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file} is not valid YAML: {yaml_fault(error)}.", allowed="section:, then key: value lines under it",
            next_step="mend that line; chulengo train --help-config shows every key",
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{file} holds a {type(loaded).__name__}, not sections.",
            allowed=f"the sections {', '.join(_field_types(RunConfig))}",
            next_step="chulengo train --help-config   (every key, its default and meaning)",
        )
    return loaded


def _apply_override(said: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"--set {override!r} is not of the form section.key=value")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    target = said
    for key in keys[:-1]:
        inner = target.get(key)
        if inner is None:
            inner = target[key] = {}
        if not isinstance(inner, dict):
            problems.append(f"--set {override!r}: {key} is a value, not a section")
            return
        target = inner
    target[keys[-1]] = value


def _said_keys(said: Mapping[str, Any]) -> set[str]:
    keys: set[str] = set()
    for name, value in said.items():
        keys |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    return keys


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _build(cls: Any, said: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    kinds = _field_types(cls)
    values: dict[str, Any] = {}
    for key, value in said.items():
        if key not in kinds:
            problems.append(_unknown(str(key), kinds, prefix))
        elif dataclasses.is_dataclass(kinds[key]):
            if value is None:
                continue
            if isinstance(value, dict):
                values[key] = _build(kinds[key], value, f"{prefix}{key}.", problems)
            else:
                problems.append(f"{prefix}{key} is a section with keys of its own, given {value!r}")
        else:
            ok, converted = _fit(value, kinds[key])
            if ok:
                values[key] = converted
            else:
                what = "a size with its unit, such as 24GiB" if key in SIZES else describe_type(kinds[key])
                problems.append(f"{prefix}{key} is {what}, given {value!r}")
    return cls(**values)


def _unknown(key: str, kinds: Mapping[str, Any], prefix: str) -> str:
    homes = [f"{name}.{key}" for name, kind in kinds.items()
             if isinstance(kind, type) and dataclasses.is_dataclass(kind) and key in _field_types(kind)]
    near = homes[0] if homes else nearest(key, kinds)
    hint = f"; did you mean {prefix}{near}?" if near else f"; known here: {', '.join(kinds)}"
    return f"unknown key {prefix}{key}{hint}"


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Returns whether `value` is of `kind`, and the value in the form the dataclass holds."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            ok, fitted = _fit(value, option)
            if ok:
                return True, fitted
        return False, value
    if origin is typing.Literal:
        return value in arguments, value
    if origin is tuple:
        if isinstance(value, str):  # one name where a list of names is wanted
            value = [value]
        is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        return is_list, tuple(value) if is_list else value
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values()), value
    if kind is type(None):
        return value is None, value
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind is float:
        if isinstance(value, str):
            try:
                return True, float(value)
            except ValueError:
                return False, value
        return isinstance(value, int | float) and not isinstance(value, bool), value
    return isinstance(value, kind), value


def describe_type(kind: Any) -> str:
    """Returns what a setting of this type may be, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if option is type(None) else describe_type(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin is tuple:
        return "a list of names"
    if origin is dict:
        return "a mapping of names to names"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))

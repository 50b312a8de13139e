"""One exception tree, and `require`, the one door to optional packages.

Every error that a user can cause is a `ChulengoError`. Its text has up to three parts, in this order: what was
given, what is allowed, what to type next. The command line prints that text without a traceback and exits with 2;
anything else that escapes is our bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ChulengoError(Exception):
    """Base of every error a user can cause and mend."""

    def __init__(self, given: str, *, allowed: str | None = None, next_step: str | None = None) -> None:
        """Joins the three parts; `given` is a sentence, `allowed` and `next_step` are shown on their own lines."""
        self.given = given
        self.allowed = allowed
        self.next_step = next_step
        super().__init__(self._text())

    def advise(self, next_step: str) -> None:
        """Replaces what to type next, where a caller knows the exact command."""
        self.next_step = next_step
        self.args = (self._text(),)

    def _text(self) -> str:
        lines = [self.given]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.next_step:
            lines.append(f"  try:     {self.next_step}")
        return "\n".join(lines)


class ConfigError(ChulengoError):
    """A configuration key, value or combination that is not allowed."""


class DataError(ChulengoError):
    """A data source that is missing, broken, empty or of an unknown form."""


class RenderError(ChulengoError):
    """A conversation that the chosen chat style cannot render exactly."""


class ModelError(ChulengoError):
    """A model folder or name that cannot be loaded."""


class DoesNotFitError(ChulengoError):
    """The planned or actual memory is more than the device has."""


class TrainingError(ChulengoError):
    """A run that cannot start, go on or be resumed."""


class MissingPackageError(ChulengoError):
    """An optional package that the asked-for feature needs is not installed."""


class NetworkError(ChulengoError):
    """Something on the network was asked for and cannot be had."""


def require(module: str, extra: str) -> ModuleType:
    """Returns the imported module, or raises `MissingPackageError` that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # a missing submodule of an installed package is a bug, not a missing extra
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingPackageError(
            f"This needs the package '{module}', which is not installed.",
            next_step=f"pip install 'chulengo[{extra}]'",
        ) from error


def yaml_fault(error: Exception) -> str:
    """Returns where and why a YAML text is broken, in one line, from PyYAML's error of several."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem or 'unreadable'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that looks most like `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None

"""The settings that lie beside a tokenizer: which tokens have an office, the chat template, the longest text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chulengo.errors import ModelError

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_text(file: Path) -> str:
    """Returns a file's text.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns `tokenizer_config.json` with the chat template and the named tokens, wherever the folder keeps them."""
    named = _json_object(folder / "special_tokens_map.json")
    settings = _json_object(folder / "tokenizer_config.json")
    for name in NAMED_TOKENS:
        if name not in settings and name in named:
            settings[name] = named[name]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates: the one for plain chat is called default
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = read_text(file)
    return {**settings, "chat_template": template if isinstance(template, str) else None}


def token_text(value: Any) -> str | None:
    """Returns the text of a token as the JSON files write it: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def max_tokens(settings: Mapping[str, Any]) -> int | None:
    """Returns `model_max_length`, or None where it is absent or the "unlimited" that transformers writes."""
    limit = settings.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < 10**9 else None


def written_by_template(tokens: Iterable[str], template: str | None) -> set[str]:
    """Returns those of the added tokens that the chat template writes: they delimit turns, whatever their flags."""
    return {token for token in tokens if template and token.strip() and token in template}

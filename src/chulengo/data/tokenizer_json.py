"""A `tokenizer.json` as a tokenizer: every model family that is not read by SentencePiece.

Read by the package `tokenizers` rather than through transformers: importing transformers loads torch (3 s), and its
`split_special_tokens` keeps only tokens flagged special from being matched in a text, and not even those in a Unigram
vocabulary (T5), where `</s>` is a piece like any other. Here text goes through a copy of the tokenizer from which the
control tokens have been taken out, so that no text can produce one; a last check makes sure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from chulengo.data.tokenizer_settings import max_tokens, token_text, written_by_template
from chulengo.errors import ModelError, RenderError


class TransformersTokenizer:
    """A tokenizer as transformers stores it."""

    kind = "transformers"

    def __init__(self, serialized: str, settings: dict[str, Any]) -> None:
        """Reads the tokenizer.

        Args:
            serialized: the content of `tokenizer.json`.
            settings: the content of `tokenizer_config.json`: `bos_token`, `eos_token`, `chat_template`, ….

        Raises:
            ModelError: `tokenizers` cannot read it.
        """
        self._whole = _tokenizer(serialized)
        self._parsed: dict[str, Any] = json.loads(serialized)
        added = {str(t["content"]): t for t in self._parsed.get("added_tokens") or []}
        self.vocab_size = max([self._whole.get_vocab_size(), *(int(t["id"]) + 1 for t in added.values())])
        named = {name: self._named(settings, name) for name in ("bos_token", "eos_token", "pad_token")}
        self.bos_id: int | None = named["bos_token"]
        self.eos_id: int | None = named["eos_token"]
        self.pad_id: int | None = named["pad_token"]
        self.model_max_tokens = max_tokens(settings)
        template = settings.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        control = {t for t, entry in added.items() if entry.get("special")}
        control |= written_by_template(added, self.chat_template)
        self._unknown = token_text(settings.get("unk_token")) or _unknown_token(self._parsed)
        self.control_tokens: dict[str, int] = {
            str(self._whole.id_to_token(i)): i for i in named.values() if i is not None
        }
        self.control_tokens |= {t: int(added[t]["id"]) for t in control}
        self.control_tokens.pop(self._unknown or "", None)
        self._control_ids = frozenset(self.control_tokens.values())
        self._text = _tokenizer(json.dumps(self._without_controls()))
        self.prefix_after_control: bool = _adds_space(self._parsed, everywhere=True)

    def _named(self, settings: dict[str, Any], name: str) -> int | None:
        text = token_text(settings.get(name))
        found = self._whole.token_to_id(text) if text is not None else None
        return None if found is None else int(found)

    def _without_controls(self) -> dict[str, Any]:
        # renamed, not removed: `tokenizers` numbers added tokens anew, in order, when it reads the file
        hidden = {token: f"\ufdd0{i}\ufdd1" for i, token in enumerate([*self.control_tokens, self._unknown or ""])}
        listed = self._parsed.get("added_tokens") or []
        added = [{**token, "content": hidden.get(token["content"], token["content"])} for token in listed]
        return {**self._parsed, "added_tokens": added, "model": _hidden(self._parsed["model"], hidden),
                "post_processor": None, "truncation": None, "padding": None}

    @cached_property
    def _inner(self) -> Any:
        parsed = self._without_controls()
        if not _adds_space(parsed, everywhere=False):
            return self._text
        parts = {key: _without_prefix(parsed.get(key)) for key in ("normalizer", "pre_tokenizer")}
        return _tokenizer(json.dumps({**parsed, **parts}))

    def encode(self, text: str, *, prefix: bool = True) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode`.

        Raises:
            RenderError: the vocabulary makes a control token out of this text whatever we do.
        """
        encoded = (self._text if prefix else self._inner).encode(text, add_special_tokens=False)
        ids: list[int] = encoded.ids
        if not self._control_ids.isdisjoint(ids):
            token = next(self.piece(i) for i in ids if i in self._control_ids)
            raise RenderError(f"The vocabulary encodes the text {token!r} as its control token.",
                              next_step="remove that text from the data")
        return ids, [start for start, _ in encoded.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(i) for i in ids if int(i) not in self._control_ids]
        return str(self._whole.decode(kept, skip_special_tokens=True))

    def control_id(self, token: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return self.control_tokens.get(token)

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        return str(self._whole.id_to_token(int(token_id)))


def _tokenizer(serialized: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"The tokenizer.json cannot be read: {error}",
                         next_step="copy tokenizer.json from the original model again") from error


def _unknown_token(parsed: dict[str, Any]) -> str | None:
    model = parsed["model"]
    if isinstance(model.get("unk_id"), int):
        return str(model["vocab"][model["unk_id"]][0])
    return token_text(model.get("unk_token"))


def _hidden(model: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    """Returns the model with tokens under names that no text can spell; ids stay, merges that lead to one go."""
    vocab, unknown = model.get("vocab"), model.get("unk_token")
    if isinstance(vocab, list):
        return {**model, "vocab": [[hidden.get(piece, piece), score] for piece, score in vocab]}
    if not isinstance(vocab, dict):
        return model
    changed = {**model, "vocab": {hidden.get(piece, piece): i for piece, i in vocab.items()}}
    if isinstance(unknown, str):
        changed["unk_token"] = hidden.get(unknown, unknown)
    if model.get("merges"):
        changed["merges"] = [merge for merge in model["merges"] if hidden.keys().isdisjoint(_merge_parts(merge))]
    return changed


def _merge_parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _steps(part: Any) -> list[dict[str, Any]]:
    """Returns the normaliser's or pre-tokenizer's steps, sequences flattened."""
    if not isinstance(part, dict):
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for each in inner for step in _steps(each)] if inner is not None else [part]


def _adds_space(parsed: dict[str, Any], *, everywhere: bool) -> bool:
    """Returns whether a space is put before a text (everywhere: also before a text in mid-conversation)."""
    for step in [*_steps(parsed.get("normalizer")), *_steps(parsed.get("pre_tokenizer"))]:
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if step["type"] == "Metaspace" and (scheme == "always" or (scheme == "first" and not everywhere)):
            return True
        if step["type"] == "Prepend" or (step["type"] == "ByteLevel" and step.get("add_prefix_space")):
            return True
    return False


def _without_prefix(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            kept = [_without_prefix(step) for step in part[key]]
            return {**part, key: [step for step in kept if step is not None]}
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part

"""Text to token ids, with the place in the text where each token starts.

Why not simply transformers' tokenizer: for Llama 2 the authority is `tokenizer.model`, read by SentencePiece. The
conversion that transformers 5 makes of that file merges runs of spaces in another order (measured: 169 of the 1,380
turns of guanaco-llama2-1k come out different). Training on other ids than the base model was trained on costs
quality in silence, so a folder with a SentencePiece BPE `tokenizer.model` is read by SentencePiece itself; every other
tokenizer is read by transformers.

Text never turns into control tokens here: `</s>` in a string is encoded as the characters it is made of. Control
tokens are only ever placed by the renderer, by id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from chulengo.errors import ModelError


class Tokenizer(Protocol):
    """What the renderer needs of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    model_max_tokens: int | None
    chat_template: str | None
    kind: str  # "sentencepiece" or "transformers"

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Returns ids and, for each, the index of the character of `text` at which it starts."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; control tokens are left out."""

    def control_id(self, token: str) -> int | None:
        """Returns the id of a control token such as `<|im_end|>`, or None when the vocabulary has none."""

    def piece(self, token_id: int) -> str:
        """Returns the vocabulary entry of one id, for display."""


class SentencePieceTokenizer:
    """A SentencePiece model, as Llama 2 and Mistral 7B use it."""

    kind = "sentencepiece"

    def __init__(self, model_file: Path, settings: dict[str, Any]) -> None:
        """Reads the model.

        Args:
            model_file: path of `tokenizer.model`.
            settings: the content of `tokenizer_config.json` (may be empty).

        Raises:
            ModelError: the file is not a SentencePiece model.
        """
        import sentencepiece

        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise ModelError(
                f"{model_file} is not a readable SentencePiece model.",
                next_step="copy tokenizer.model from the original model again",
            ) from error
        self.vocab_size: int = int(self._model.vocab_size())
        self.bos_id: int | None = _valid(self._model.bos_id())
        self.eos_id: int | None = _valid(self._model.eos_id())
        self.pad_id: int | None = _valid(self._model.pad_id())
        self.model_max_tokens = _max_tokens(settings)
        template = settings.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._added = _added_tokens(settings, self.vocab_size)
        self.vocab_size = max([self.vocab_size, *(i + 1 for i in self._added.values())])
        self._piece_bytes = np.array(
            [self._byte_length(i) for i in range(int(self._model.vocab_size()))], dtype=np.int64
        )
        self._adds_space = self._model.encode("a", out_type=str)[0].startswith("\u2581")

    def _byte_length(self, token_id: int) -> int:
        if self._model.is_byte(token_id):
            return 1
        return len(self._model.id_to_piece(token_id).replace("\u2581", " ").encode())

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode`."""
        if not text:
            return [], []
        ids: list[int] = self._model.encode(text)
        raw = text.encode()
        lengths = self._piece_bytes[ids]
        ends = np.cumsum(lengths)
        shift = 1 if self._adds_space else 0
        # the pieces spell " " + text, byte for byte; an unknown piece (no byte fallback) breaks the sum
        if int(ends[-1]) != len(raw) + shift:
            return ids, self._starts_by_decoding(ids, text)
        starts = np.maximum(ends - lengths - shift, 0)
        if len(raw) != len(text):
            char_of_byte = np.cumsum((np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80) - 1
            starts = char_of_byte[starts]
        return ids, starts.tolist()

    def _starts_by_decoding(self, ids: list[int], text: str) -> list[int]:
        # slow and rare: models without byte fallback, where an unknown piece stands for any number of characters
        starts, place = [], 0
        unknown = self._model.unk_id()
        pieces = [self._model.id_to_piece(i).replace("\u2581", " ") for i in ids]
        for index, (token_id, piece) in enumerate(zip(ids, pieces, strict=True)):
            starts.append(min(place, len(text)))
            if token_id == unknown:
                following = next((p for t, p in zip(ids[index + 1 :], pieces[index + 1 :], strict=True)
                                  if t != unknown), None)
                found = text.find(following, place) if following is not None else len(text)
                place = found if found >= 0 else len(text)
            else:
                place += len(piece) - (1 if index == 0 and self._adds_space else 0)
        return starts

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        size = int(self._model.vocab_size())
        return str(self._model.decode([int(i) for i in ids if int(i) < size]))

    def control_id(self, token: str) -> int | None:
        """See `Tokenizer.control_id`."""
        if token in self._added:
            return self._added[token]
        token_id = int(self._model.piece_to_id(token))
        return token_id if self._model.is_control(token_id) and self._model.id_to_piece(token_id) == token else None

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        for token, added_id in self._added.items():
            if added_id == token_id:
                return token
        return str(self._model.id_to_piece(token_id))


class TransformersTokenizer:
    """Any other tokenizer, read by transformers."""

    kind = "transformers"

    def __init__(self, tokenizer: Any) -> None:
        """Wraps a `PreTrainedTokenizerFast`.

        Raises:
            ModelError: the tokenizer is a slow one, which cannot say where a token starts.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer without offsets.",
                next_step="add the model's tokenizer.json to its folder",
            )
        self._tokenizer = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int | None = tokenizer.pad_token_id
        limit = int(tokenizer.model_max_length or 0)
        self.model_max_tokens = limit if 0 < limit < 10**9 else None
        template = tokenizer.chat_template
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._controls: dict[str, int] = {
            str(token.content): int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode`."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [int(start) for start, _ in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def control_id(self, token: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return self._controls.get(token)

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        return str(self._tokenizer.convert_ids_to_tokens(int(token_id)))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a local model folder.

    Raises:
        ModelError: the folder has no tokenizer, or one that cannot be read.
    """
    settings = _settings(folder)
    model_file = folder / "tokenizer.model"
    if model_file.is_file() and _is_sentencepiece(model_file):
        return SentencePieceTokenizer(model_file, settings)
    names = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise ModelError(
            f"{folder} has no tokenizer.",
            allowed="tokenizer.model, tokenizer.json or spiece.model beside config.json",
            next_step="copy the base model's tokenizer files into that folder",
        )
    from transformers import AutoTokenizer

    try:
        return TransformersTokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    settings: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        settings = {**settings, "chat_template": template_file.read_text(encoding="utf-8")}
    return settings


def _is_sentencepiece(file: Path) -> bool:
    # Llama 3 and others ship a tiktoken file under the same name: lines of base64, a space and a rank
    head = file.read_bytes()[:64]
    return not (head.split(b"\n")[0].split(b" ")[-1].isdigit() and b"\x00" not in head)


def _valid(token_id: int) -> int | None:
    return int(token_id) if token_id >= 0 else None


def _max_tokens(settings: dict[str, Any]) -> int | None:
    limit = settings.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < 10**9 else None


def _added_tokens(settings: dict[str, Any], size: int) -> dict[str, int]:
    added: dict[str, int] = {}
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        if int(token_id) >= size:
            added[str(token["content"])] = int(token_id)
    return added

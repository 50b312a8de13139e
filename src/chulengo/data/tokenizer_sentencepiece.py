"""A SentencePiece model as a tokenizer: Llama 2, Mistral 7B, Gemma, and the embedded nano model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chulengo.data.tokenizer_settings import max_tokens, token_text, written_by_template
from chulengo.errors import ModelError

SPACE = "\u2581"


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
        self._file = model_file
        self.model_max_tokens = max_tokens(settings)
        template = settings.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        model = _processor(model_file.read_bytes(), model_file)
        size = int(model.vocab_size())
        added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
        named = {str(token_text(token)): i for i, token in added.items()}
        special = {str(token_text(t)) for t in added.values() if isinstance(t, dict) and t.get("special")}
        special |= written_by_template(named, self.chat_template)
        # some models (Gemma) list their turn marks as user-defined pieces, which plain text would match
        marks = {t for t in special if named[t] < size and _is_text_piece(model, named[t])}
        self._proto = _rewritten(model_file.read_bytes(), control=marks) if marks else model_file.read_bytes()
        self._model: Any = _processor(self._proto, model_file) if marks else model
        self.bos_id: int | None = _valid(self._model.bos_id())
        self.eos_id: int | None = _valid(self._model.eos_id())
        self.pad_id: int | None = _valid(self._model.pad_id())
        self._pieces = [str(self._model.id_to_piece(i)) for i in range(size)]
        self.control_tokens: dict[str, int] = {
            piece: i for i, piece in enumerate(self._pieces) if self._model.is_control(i)
        }
        self.control_tokens |= {t: i for t, i in named.items() if i >= size and t in special}
        self._added = {i: t for t, i in named.items() if i >= size}
        self.vocab_size: int = max([size, *(i + 1 for i in self._added)])
        lengths = [1 if self._model.is_byte(i) else len(piece.replace(SPACE, " ").encode())
                   for i, piece in enumerate(self._pieces)]
        self._piece_bytes = np.array(lengths, dtype=np.int64)
        self._adds_space = str(self._model.encode("a", out_type=str)[0]).startswith(SPACE)
        self.prefix_after_control: bool = self._adds_space and settings.get("legacy") is not False

    @cached_property
    def _inner(self) -> Any:
        # the same model without the space that it puts before a text
        return _processor(_rewritten(self._proto, dummy_prefix=False), self._file)

    def encode(self, text: str, *, prefix: bool = True) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode`."""
        if not text:
            return [], []
        shift = 1 if prefix and self._adds_space else 0
        model = self._model if shift or not self._adds_space else self._inner
        ids: list[int] = model.encode(text)
        raw = text.encode()
        lengths = self._piece_bytes[ids]
        ends = np.cumsum(lengths)
        if not ids or int(ends[-1]) != len(raw) + shift:
            # the pieces do not spell the text byte for byte: it was normalised, or a piece stands for the unknown
            encoded = model.encode(text, return_type="proto")
            starts = np.array([piece.begin for piece in encoded.pieces], dtype=np.int64)
        else:
            starts = np.maximum(ends - lengths - shift, 0)
        if len(raw) != len(text):
            char_of_byte = np.cumsum((np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80) - 1
            starts = char_of_byte[np.minimum(starts, len(raw) - 1)]
        return ids, starts.tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        size = len(self._pieces)
        return str(self._model.decode([int(i) for i in ids if int(i) < size]))

    def control_id(self, token: str) -> int | None:
        """See `Tokenizer.control_id`."""
        return self.control_tokens.get(token)

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        added = self._added.get(int(token_id))
        return added if added is not None else self._pieces[int(token_id)]


def _processor(proto: bytes, file: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"{file} is not a readable SentencePiece model.",
            next_step="copy tokenizer.model from the original model again",
        ) from error


def _rewritten(proto: bytes, *, control: set[str] | None = None, dummy_prefix: bool | None = None) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined,unused-ignore]
    model.ParseFromString(proto)
    for piece in model.pieces:
        if control and piece.piece in control:
            piece.type = type(piece).CONTROL
    if dummy_prefix is not None:
        model.normalizer_spec.add_dummy_prefix = dummy_prefix
    return bytes(model.SerializeToString())


def _is_text_piece(model: Any, token_id: int) -> bool:
    return not (model.is_control(token_id) or model.is_byte(token_id) or model.is_unknown(token_id))


def _valid(token_id: int) -> int | None:
    return int(token_id) if token_id >= 0 else None

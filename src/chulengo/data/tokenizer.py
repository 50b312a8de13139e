"""Text to token ids, with the place in the text where each token starts.

Why not simply transformers' tokenizer: for Llama 2 the authority is `tokenizer.model`, read by SentencePiece. The
conversion that transformers 5 makes of that file merges runs of spaces in another order (measured: 169 of the 1,380
turns of guanaco-llama2-1k come out different). Training on other ids than the base model was trained on costs
quality in silence, so a folder with a SentencePiece BPE `tokenizer.model` is read by SentencePiece itself
(`tokenizer_sentencepiece.py`); every other one by `tokenizers`, from `tokenizer.json` (`tokenizer_json.py`).

Text never turns into control tokens here: `</s>` in a string is encoded as the characters it is made of. Control
tokens are only ever placed by the renderer, by id. What counts as one: the vocabulary's control pieces, every added
token marked special, and every added token that the chat template writes.

Two questions have answers that differ between model families, so they are asked of the tokenizer:
does a text get a space put before it (`prefix`), and does that also happen after a control token in mid-conversation
(`prefix_after_control`)? Llama 2 says yes and yes, Llama 3 no and no, and a tokenizer saved with `legacy: false`
yes and no.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from chulengo.data.tokenizer_settings import NAMED_TOKENS, read_settings, read_text
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
    control_tokens: dict[str, int]  # text of each control token -> id; the unknown token is not one
    prefix_after_control: bool  # whether text after a control token gets the same leading space as a first text

    def encode(self, text: str, *, prefix: bool = True) -> tuple[list[int], list[int]]:
        """Returns ids and, for each, the index of the character of `text` at which it starts.

        Args:
            text: any text; what looks like a control token in it stays text.
            prefix: True puts the space before it that the tokenizer puts before a text (if it does);
                False encodes exactly these characters, as in the middle of a text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; control tokens are left out."""

    def control_id(self, token: str) -> int | None:
        """Returns the id of a control token such as `<|im_end|>`, or None when the vocabulary has none."""

    def piece(self, token_id: int) -> str:
        """Returns the vocabulary entry of one id, for display."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a local model folder.

    Raises:
        ModelError: the folder has no tokenizer, or one that cannot be read.
    """
    settings = read_settings(folder)
    model_file = folder / "tokenizer.model"
    if model_file.is_file() and _is_sentencepiece(model_file):
        from chulengo.data.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(model_file, settings)
    names = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise ModelError(
            f"{folder} has no tokenizer.",
            allowed="tokenizer.model, tokenizer.json or spiece.model beside config.json",
            next_step="copy the base model's tokenizer files into that folder",
        )
    from chulengo.data.tokenizer_json import TransformersTokenizer

    file = folder / "tokenizer.json"
    if file.is_file() and any(settings.get(name) for name in ("bos_token", "eos_token")):
        return TransformersTokenizer(read_text(file), settings)
    # no tokenizer.json, or nobody says which token ends a text (GPT-2): only transformers' classes know
    return TransformersTokenizer(*_by_transformers(folder, settings))


def _by_transformers(folder: Path, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer without offsets.",
            next_step="add the model's tokenizer.json to its folder",
        )
    found = {name: getattr(tokenizer, name, None) for name in NAMED_TOKENS}
    found = {name: str(token) for name, token in found.items() if token is not None}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    limit = {"model_max_length": tokenizer.model_max_length, "chat_template": template}
    return str(tokenizer.backend_tokenizer.to_str()), {**settings, **limit, **found}


def _is_sentencepiece(file: Path) -> bool:
    # Llama 3 and others ship a tiktoken file under the same name: lines of base64, a space and a rank
    with file.open("rb") as opened:
        head = opened.read(64)
    return not (head.split(b"\n")[0].split(b" ")[-1].isdigit() and b"\x00" not in head)

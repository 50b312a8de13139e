"""Token ids to text while the tokens are still coming.

A token is not a piece of text: a character outside the vocabulary comes as several byte tokens (a llama emoji is
four), and a SentencePiece token carries its leading space, which is dropped at the start of a decoded string only.
So the whole answer is decoded again after each token and what is new is handed out. That is quadratic in the answer's
length, and small beside the model: decoding 2,000 tokens takes under a millisecond.

Text is held back while it could still change: half a character (a decoder writes U+FFFD for it) and trailing white
space (which is stripped when the answer ends there). At a cut answer's end half a character is no text and is left out;
the ids keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF_CHARACTER = "\ufffd"


def settled(text: str) -> str:
    """Returns the decoded text without a half character at its end."""
    return text.rstrip(HALF_CHARACTER).rstrip() if text.endswith(HALF_CHARACTER) else text


class TextStream:
    """Turns a growing list of ids into pieces of text that, joined, are the answer's text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Args: the function that decodes all ids of an answer."""
        self._decode = decode
        self.text = ""  # handed out so far

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text that is new and final, given all ids so far; perhaps empty."""
        return self._advance(self._decode(ids).rstrip(HALF_CHARACTER).rstrip())

    def finish(self, ids: Sequence[int]) -> str:
        """Returns what was held back, given all ids of the finished answer."""
        return self._advance(settled(self._decode(ids)))

    def _advance(self, whole: str) -> str:
        if not whole.startswith(self.text):
            return ""
        piece, self.text = whole[len(self.text) :], whole
        return piece

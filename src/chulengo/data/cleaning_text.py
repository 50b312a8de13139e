"""Cleaning of one text: the functions behind the text steps of `cleaning`."""

from __future__ import annotations

import html
import re
import unicodedata

_MARKDOWN_LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\((?:https?://|www\.)[^)\s]*\)")
_URL = re.compile(r"[ \t]?(?<![\w@])<?(?:https?://|www\.)[!-;=?-~]*[\w/#&=~+%-]>?", re.IGNORECASE | re.ASCII)
_HANDLE = re.compile(r"[ \t]?(?<![A-Za-z0-9_@./+\-])@[A-Za-z0-9_]{1,30}\b(?!\(|\.\w|/|@)", re.ASCII)
_BREAK = re.compile(r"[ \t]*<br\s*/?>[ \t]*", re.IGNORECASE)
_FENCE = re.compile(r"(^```.*?^```[^\n]*$|^```.*\Z)", re.DOTALL | re.MULTILINE)
_RUN = re.compile(r"(?<=\S)[^\S\n]+")
_TRAILING = re.compile(r"[^\S\n]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")
# C0 and C1 controls but tab and newline, zero-width space, word joiner, byte-order mark, bidirectional overrides;
# the zero-width joiner and non-joiner stay: emoji and Persian are written with them
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")


def strip_urls(text: str) -> str:
    """Returns the text without web addresses; of a markdown link its words stay."""
    return _URL.sub("", _MARKDOWN_LINK.sub(r"\1", text))


def strip_handles(text: str) -> str:
    """Returns the text without `@name` handles; e-mail addresses, `@name(`, `@a.b` and `@a/b` (code) stay."""
    return _HANDLE.sub("", text)


def unescape_html(text: str) -> str:
    """Returns the text with HTML entities (`&amp;`) as the characters they stand for, once."""
    return html.unescape(text)


def break_lines(text: str) -> str:
    """Returns the text with `<br>` tags as line ends."""
    return _BREAK.sub("\n", text)


def strip_control_chars(text: str) -> str:
    """Returns the text without invisible control characters, with line ends as `\\n`."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def collapse_whitespace(text: str) -> str:
    """Returns the text with runs of blanks as one, at most one empty line in a row, and nothing blank around it.

    Line ends and the indentation of lines stay, and so does everything between code fences.
    """
    parts = _FENCE.split(text)
    parts[::2] = [_EMPTY_LINES.sub("\n\n", _RUN.sub(" ", _TRAILING.sub("", part))) for part in parts[::2]]
    joined = "".join(parts)
    first_line = re.match(r"(?:[^\S\n]*\n)*[^\S\n]*", joined)
    return joined[first_line.end() if first_line else 0 :].rstrip()


def compose_unicode(text: str) -> str:
    """Returns the text in Unicode's composed form (NFC): é as one character, however it was typed."""
    return unicodedata.normalize("NFC", text)

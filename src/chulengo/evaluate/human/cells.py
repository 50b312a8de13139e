"""Texts in spreadsheet cells: nothing in an answer may act as a formula, and what went out comes back the same.

A spreadsheet program takes a cell that begins with `=`, `+`, `-` or `@` for a formula (an answer can then fetch a web
page from the rater's machine), `1-2` for a date and `007` for 7. Such cells get an apostrophe in front, which every
program leaves as text. A cell that begins with an apostrophe gets one too, so that taking one away always gives the
original back. Sentences with digits inside are never taken for numbers and stay as they are.

What is compared on the way back ignores white space and apostrophes at the start: programs change line ends and blanks
when they save, and some swallow the apostrophe.

The limit: a program that is set to another delimiter than the comma cuts the cells elsewhere, so that a formula in
the middle of an answer may stand at the start of a cell. The guide beside the sheets says to import with the comma.
"""

from __future__ import annotations

import re
import unicodedata

MARK = "'"
MAX_CELL_CHARS = 32_767  # Excel cuts a longer cell
# the last four are full-width forms, which an East Asian setting reads the same way
_FORMULA_STARTS = "=+-@\t\r\n" + MARK + "＝＋－＠"
_SHORT = 40  # characters: no date, time or number is longer
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,10}")  # comes back as it is; a twelfth digit would be rounded away
_TRUTH = {"true", "false"}
_DATE_WORD = re.compile(
    r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun)\w*|am|pm|a|p|e|th|st|nd|rd", re.I
)


def protected(text: str) -> str:
    """Returns the text as a spreadsheet cell that stays text."""
    return MARK + text if _is_taken_for_something(text) else text


def unprotected(cell: str) -> str:
    """Returns the text that `protected` made a cell of."""
    return cell[1:] if cell.startswith(MARK) else cell


def same_text(one: str, other: str) -> bool:
    """Returns whether two texts are equal but for white space, apostrophes in front and the way accents are stored."""
    return _essence(one) == _essence(other)


def _is_taken_for_something(text: str) -> bool:
    bare = text.strip()
    if text.startswith(tuple(_FORMULA_STARTS)) or bare.startswith(tuple(_FORMULA_STARTS)):
        return True
    if len(bare) > _SHORT or not any(c.isdigit() for c in bare):
        return bare.casefold() in _TRUTH
    if _WHOLE_NUMBER.fullmatch(text):
        return False
    # one unknown word may be a month in another language
    return sum(not _DATE_WORD.fullmatch(word) for word in re.findall(r"[^\W\d_]+", bare)) <= 1


def _essence(text: str) -> str:
    return re.sub(r"\s+", "", unicodedata.normalize("NFC", text)).lstrip(MARK)

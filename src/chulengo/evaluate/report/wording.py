"""How numbers and foreign text are put into words: one place, so that a page never says one number in two ways.

Text from models and data is hostile until shown otherwise. Escaping is the template engine's work (autoescape); what
it lets through and a page cannot hold is replaced here: control characters, which no parser agrees on, and lone
surrogates, which have no bytes in UTF-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

ABSENT = "not measured"
UNDEFINED = "undefined"  # measured, but these items define no such number
LARGEST = 1e100
MINUS, THIN = "\u2212", "\u202f"  # a true minus; a narrow space that never breaks
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_NAMES = {
    "bleu": "BLEU", "chrf++": "chrF++", "ter": "TER", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum", "squad_exact_match": "SQuAD exact match", "squad_f1": "SQuAD F1",
    "macro_f1": "Macro F1", "weighted_f1": "Weighted F1", "token_f1": "Token F1", "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2", "bertscore_precision": "BERTScore precision", "bertscore_recall": "BERTScore recall",
    "bertscore_f1": "BERTScore F1", "bits_per_byte": "Bits per byte",
}  # fmt: skip


def visible(text: str) -> str:
    """Returns the text with what no page can hold replaced: control characters and lone surrogates."""
    return _UNSHOWABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def number(value: Any) -> float | None:
    """Returns a finite number as float, None for anything else: results come from files, and files from anywhere.

    Sizes that no measurement has (over 1e100, and under 1e-100, which is 0) would only overflow in an axis.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    if not abs(found) < LARGEST:
        return None
    return 0.0 if abs(found) < 1 / LARGEST else found


def interval(value: Any) -> tuple[float, float] | None:
    """Returns a pair of finite numbers, None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None or low > high else (low, high)


def metric_name(name: str) -> str:
    """Returns a metric's name as people write it."""
    head, colon, label = name.partition(":")
    if head in _NAMES:
        shown = _NAMES[head]
    elif head.endswith("_ascii") and head.removesuffix("_ascii") in _NAMES:
        shown = f"{_NAMES[head.removesuffix('_ascii')]} (ASCII)"
    else:
        shown = head.replace("_", " ").strip() or "(no name)"
        shown = shown[0].upper() + shown[1:]
    return f"{shown} of “{label}”" if colon else shown


def score(value: float | None, unit: str) -> str:
    """Returns a score in its unit: a share in percent, points with one decimal, else with decimals to suit its size."""
    if value is None:
        return ABSENT
    if unit == "share":
        return f"{_fixed(100 * value, 1)}{THIN}%"
    return _fixed(value, 1) if unit == "points" else _plain(value)


def span(bounds: tuple[float, float] | None, unit: str, *, signed: bool = False) -> str:
    """Returns an interval such as "79.1 to 85.3", in the unit of `score` (or of `change`) without its sign."""
    if bounds is None:
        return ABSENT
    show = change if signed else score
    return " to ".join(show(bound, unit).removesuffix(f"{THIN}%").removesuffix(" points") for bound in bounds)


def change(value: float | None, unit: str) -> str:
    """Returns a difference with its sign: shares and points as points, anything else as `score` writes it."""
    if value is None:
        return ABSENT
    size = abs(100 * value if unit == "share" else value)
    text = _plain(size) if unit == "number" else _fixed(size, 1)
    sign = "" if not any(digit in "123456789" for digit in text) else MINUS if value < 0 else "+"
    return f"{sign}{text}" + ("" if unit == "number" else " points")


def digits(value: float | None, most: int = 4) -> str:
    """Returns a number to at most `most` significant digits, with thousands separated and no exponent up to 1e7."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, _, power = f"{value:.{most - 1}e}".partition("e")
        return f"{_trimmed(mantissa)}e{int(power)}".replace("-", MINUS)
    decimals = max(0, most - 1 - math.floor(math.log10(abs(value))))
    return _trimmed(f"{value:,.{decimals}f}").replace("-", MINUS)


def whole(value: Any) -> str:
    """Returns a count with thousands separated."""
    found = number(value)
    return ABSENT if found is None else f"{found:,.0f}".replace("-", MINUS)


def percent(value: Any, decimals: int = 1) -> str:
    """Returns a share as a percentage."""
    found = number(value)
    return ABSENT if found is None else f"{_fixed(100 * found, decimals)}{THIN}%"


def duration(seconds: Any) -> str:
    """Returns a time in the two largest units that matter, such as "1 h 12 min"."""
    found = number(seconds)
    if found is None or found < 0:
        return ABSENT
    if found < 59.95:
        return f"{found:.1f} s" if found < 10 else f"{found:.0f} s"
    whole_s = round(found)
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60} s"
    minutes = round(found / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def memory(num_bytes: Any) -> str:
    """Returns a size in MiB or GiB."""
    found = number(num_bytes)
    if found is None or found <= 0:
        return ABSENT
    return f"{found / 2**30:,.1f} GiB" if found >= 2**30 else f"{found / 2**20:,.0f} MiB"


def setting(value: Any) -> str:
    """Returns a setting's value as one types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(setting, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else "''"


def short_hash(text: Any) -> str:
    """Returns the first 16 digits of a hash, without the name of the function."""
    return str(text).rpartition(":")[2][:16]


def listed(names: Sequence[str], most: int = 10) -> str:
    """Returns names in one line, the rest counted."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _plain(value: float) -> str:
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        return digits(value, 3)
    # fixed decimals for a size, so that a score, its interval and the other side's line up and compare
    return _fixed(value, 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text

"""Numbers in sentences: `1 row`, `1,380 rows`."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Returns the number with its noun, in the singular for one: `1 row`, `0 rows`, `1,380 rows`.

    Args:
        count: how many.
        noun: in the singular.
        plural: where it is not the singular with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def four_digits(value: float, sign: str = "") -> str:
    """Returns four significant digits; a perplexity of 13,910 is written so, and not 1.391e+04.

    Args:
        value: any number.
        sign: "+" shows the sign of positive numbers too.
    """
    return f"{value:{sign},.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:{sign}.4g}"

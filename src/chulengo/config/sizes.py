"""Sizes of memory as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
         "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def bytes_of(text: str | None) -> int | None:
    """Returns the bytes that a size such as 24GiB, 80GB, 512M or 1000000 says, None for no size; G alone is GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in UNITS or float(match.group(1)) <= 0:
        return None
    return int(float(match.group(1)) * UNITS[match.group(2).upper()])

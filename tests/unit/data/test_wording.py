"""Numbers as sentences and tables show them."""

from __future__ import annotations

import pytest

from chulengo.data.wording import four_digits


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [(1.0061, "", "1.006"), (2516.4, "", "2516"), (9999.4, "", "9999"), (13_912.6, "", "13,913"),
     (-243_541.2, "", "-243,541"), (13_912.6, "+", "+13,913"), (0.5, "+", "+0.5"), (2.5e9, "", "2.5e+09")],
)
def test_large_perplexities_have_no_exponent(value: float, sign: str, shown: str) -> None:
    assert four_digits(value, sign) == shown

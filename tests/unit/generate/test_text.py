from __future__ import annotations

from collections.abc import Sequence

import pytest

from chulengo.generate.text import TextStream, settled
from tiny_models import ByteRenderer


def pieces(data: bytes) -> list[str]:
    stream = TextStream(ByteRenderer().decode)
    ids = list(data)
    out = [stream.push(ids[: i + 1]) for i in range(len(ids))]
    return [*out, stream.finish(ids)]


@pytest.mark.parametrize("text", ["a 🦙 b", "naïve\n\nçà", " leading and trailing \n", "日本語", "", "a\ufffdb"])
def test_pieces_join_to_the_text_and_halves_never_show(text: str) -> None:
    got = pieces(text.encode())
    assert "".join(got) == text.strip()
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in got)


def test_a_character_appears_with_its_last_byte() -> None:
    assert pieces("x🦙".encode()) == ["x", "", "", "", "🦙", ""]


def test_half_a_character_at_a_cut_is_left_out() -> None:
    got = pieces("ab 🦙".encode()[:-1])
    assert "".join(got) == "ab" == settled("ab \ufffd\ufffd\ufffd")


def test_space_is_held_back_until_a_letter_follows() -> None:
    assert pieces(b"a  b ") == ["a", "", "", "  b", "", ""]


def test_a_broken_byte_in_the_middle_stays_visible() -> None:
    assert "".join(pieces(b"a\xffb")) == "a\ufffdb"


def test_a_decoder_that_rewrites_waits() -> None:
    texts = ["", "don", "do", "do not"]

    def decode(ids: Sequence[int]) -> str:
        return texts[len(ids)]

    stream = TextStream(decode)
    assert [stream.push([0] * n) for n in (1, 2)] == ["don", ""]

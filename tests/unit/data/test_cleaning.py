"""Cleaning steps: what each changes, and above all what it leaves alone."""

from __future__ import annotations

import pytest

from chulengo.data.cleaning import STEPS, CleaningCounts, clean, parse_step
from chulengo.data.types import Example, Message, Role
from chulengo.errors import ConfigError

ROLES: dict[str, Role] = {"u": "user", "a": "assistant", "s": "system", "t": "text"}


def example(*turns: str, rejected: str | None = None, references: tuple[str, ...] = ()) -> Example:
    messages = tuple(Message(ROLES[turn[0]], turn[2:]) for turn in turns)
    other = () if rejected is None else (Message("assistant", rejected),)
    return Example(
        messages, "x:1", "chat" if rejected is None else "preference", rejected=other, references=references
    )


def one(step: str, text: str) -> str:
    cleaned = clean(example(f"u:{text}"), [step])
    assert cleaned is not None
    return cleaned.messages[0].content


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("strip_urls", "see https://a.b/c?d=e#f now", "see now"),
        ("strip_urls", "see http://a.b/c.", "see."),
        ("strip_urls", "(www.example.com)", "()"),
        ("strip_urls", "[the page](https://a.b/c) here", "the page here"),
        ("strip_urls", "看https://a.b/c，好", "看，好"),
        ("strip_urls", "version 1.2/3, a//b, http status, me@www.org", "version 1.2/3, a//b, http status, me@www.org"),
        ("strip_handles", "@Support hello @you_2, ok", " hello, ok"),
        ("strip_handles", "你好@user!", "你好!"),
        ("strip_handles", "me@mail.org and a.b@c.de", "me@mail.org and a.b@c.de"),
        ("strip_handles", "@app.route('/') @cache() @scope/x", "@app.route('/') @cache() @scope/x"),
        ("strip_handles", "5 @ 3 @-@", "5 @ 3 @-@"),
        ("strip_handles", "thanks @user. Bye", "thanks. Bye"),
        ("unescape_html", "a &amp; b &lt;c&gt; &#233; &quot;", 'a & b <c> é "'),
        ("unescape_html", "AT&T &amp;amp;", "AT&T &amp;"),
        ("break_lines", "a<br /><br>b <BR/> c", "a\n\nb\nc"),
        ("strip_control_chars", "a\x00b\x1b\u200b\ufeffc\td\r\ne\rf", "abc\td\ne\nf"),
        ("strip_control_chars", "👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم"),
        ("collapse_whitespace", "  a  b\t\tc  \n\n\n\n d\u00a0\u00a0e \n", "a b c\n\n d e"),
        ("collapse_whitespace", "x:\n    if  a:\n        b", "x:\n    if a:\n        b"),
        ("collapse_whitespace", "a  b\n```py\nx  =  1\n\n\n\ny\n```\nc  d", "a b\n```py\nx  =  1\n\n\n\ny\n```\nc d"),
        ("compose_unicode", "e\u0301", "é"),
    ],
)
def test_text_steps(step: str, text: str, expected: str) -> None:
    assert one(step, text) == expected
    assert one(step, "nothing to do") == "nothing to do"
    if step != "unescape_html":
        assert one(step, expected) == expected


def test_text_steps_reach_every_text_of_a_row() -> None:
    row = example("s:a  b", "u:a  b", "a:a  b", rejected="a  b", references=("a  b", "c"))
    cleaned = clean(row, ["collapse_whitespace"])
    assert cleaned is not None
    assert [message.content for message in (*cleaned.messages, *cleaned.rejected)] == ["a b"] * 4
    assert cleaned.references == ("a b", "c")
    assert (cleaned.kind, cleaned.source) == ("preference", "x:1")


@pytest.mark.parametrize(
    ("step", "turns", "kept"),
    [
        ("cut_leading_answers", ["a:x", "a:y", "u:q", "a:b"], ["u:q", "a:b"]),
        ("cut_leading_answers", ["s:S", "a:x", "u:q", "a:b", "u:r", "a:c"], ["s:S", "u:q", "a:b", "u:r", "a:c"]),
        ("cut_trailing_questions", ["u:q", "a:b", "u:r", "u:s"], ["u:q", "a:b"]),
        ("cut_trailing_questions", ["u:q"], ["u:q"]),
        ("merge_turns", ["u:q", "u:r", "a:b", "a:c", "u:s"], ["u:q\n\nr", "a:b\n\nc", "u:s"]),
        ("drop_unanswered", ["u:q", "a:b"], ["u:q", "a:b"]),
        ("drop_unanswered", ["u:q"], None),
        ("drop_unanswered", ["u:q", "a: \n"], None),
        ("drop_unanswered", [], None),
        ("drop_empty", ["u:q", "a:", "u:r", "a:b"], None),
        ("drop_empty", ["u:q", "a:b"], ["u:q", "a:b"]),
        ("drop_short:3", ["u:q", "a:b"], None),
        ("drop_short:2", ["u:q", "a:b"], ["u:q", "a:b"]),
        ("drop_long:1", ["u:q", "a:b"], None),
        ("drop_long:2", ["u:q", "a:b"], ["u:q", "a:b"]),
        ("drop_short_answers:2", ["u:long question", "a:b"], None),
        ("drop_short_answers:1", ["u:long question", "a:b"], ["u:long question", "a:b"]),
        ("drop_unreadable", ["u:q"], ["u:q"]),
        ("keep_leading_answers", ["a:q"], ["a:q"]),
    ],
)
def test_row_steps(step: str, turns: list[str], kept: list[str] | None) -> None:
    cleaned = clean(example(*turns), [step])
    assert (cleaned and [f"{m.role[0]}:{m.content}" for m in cleaned.messages]) == kept


def test_pairs_are_measured_and_checked_on_both_sides() -> None:
    pair = example("u:q", "a:bb", rejected="cccc")
    assert clean(pair, ["drop_long:4"]) is None
    assert clean(pair, ["drop_long:5"]) == pair
    assert clean(pair, ["drop_short:4"]) is None
    assert clean(pair, ["drop_short:3"]) == pair
    assert clean(example("u:q", "a:b", rejected=" "), ["drop_unanswered"]) is None


def test_steps_run_in_order_and_are_counted() -> None:
    counts = CleaningCounts()
    steps = ["unescape_html", "collapse_whitespace", "drop_short:5"]
    assert clean(example("u:a&nbsp;&nbsp;b", "a:ccc"), steps, counts) == example("u:a b", "a:ccc")
    assert clean(example("u:a", "a:b"), steps, counts) is None
    assert clean(example("u:plain", "a:text"), steps, counts) == example("u:plain", "a:text")
    assert (counts.changed, counts.dropped) == ({"unescape_html": 1, "collapse_whitespace": 1}, {"drop_short:5": 1})
    assert clean(example("u:a &amp;nbsp;", "a:b"), ["unescape_html", "unescape_html"]) == example("u:a \xa0", "a:b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strip_url", "--set data.cleaning=[strip_urls]"),
        ("drop_short", "needs a number of characters"),
        ("drop_short:x", "needs a number of characters"),
        ("drop_short:-1", "needs a number of characters"),
        ("strip_urls:3", "takes no number"),
    ],
)
def test_faulty_steps(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_step(text)
    assert said in str(caught.value)


def test_steps_are_described() -> None:
    assert all(name == step.name and step.description for name, step in STEPS.items())

from __future__ import annotations

import re
from html.parser import HTMLParser

from chulengo.evaluate.results import Score
from chulengo.evaluate.simulate.goals import read_goal
from chulengo.evaluate.simulate.page import transcripts_page
from chulengo.evaluate.simulate.scenarios import Scenario
from chulengo.evaluate.simulate.talk import Asked, Conversation, Said

EVIL = """<script>alert(1)</script>"'&<img src=x onerror=alert(2)>"""
VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Tags and text of a page; fails where tags do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> str:
    scenario = Scenario(EVIL, EVIL, persona=EVIL, goal=EVIL, system=EVIL, real_answers=(EVIL, "the real end"),
                        met_when=read_goal({"facts": [EVIL, ["never", EVIL + "!"]]}, "here"))
    talk = Conversation(Asked(EVIL, scenario), (Said(EVIL), Said("last", True)), (Said(EVIL, True, 1, 2, "length"),),
                        "client_stop", False, (1, None))
    score = Score("goal_reached", "v/1", EVIL, 0.5, 2, (0.1, 0.9), unit="share")
    return transcripts_page([talk] * 21, [score], {"Agent": EVIL, EVIL: "x"}, title=EVIL)


def test_the_page_is_sound_and_everything_in_it_is_text() -> None:
    tags = Tags()
    tags.feed(page())
    tags.close()
    assert tags.open == []
    assert "script" not in tags.seen
    assert "img" not in tags.seen
    assert "link" not in tags.seen
    assert not any(name.startswith("on") or (name in ("src", "href") and not str(value).startswith("#"))
                   for name, value in tags.attributes)
    assert tags.text.count(EVIL) > 21 * 6
    assert "the real end" in tags.text
    assert "goal not reached" in tags.text
    assert "cut at the token limit" in tags.text
    assert "50.0 %" in tags.text


def test_the_page_needs_nothing_else() -> None:
    text = page()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    assert text.count("<details") == 21
    assert text.count(" open>") == 20

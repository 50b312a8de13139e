from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from chulengo.data.types import Message
from chulengo.errors import DataError
from chulengo.evaluate.simulate.dialogues import alternating, dialogue_turns, load_dialogues


def user(text: str) -> Message:
    return Message("user", text)


def agent(text: str) -> Message:
    return Message("assistant", text)


def table(folder: Path, *dialogues: str) -> str:
    file = folder / "d.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = [(str(number), dialogue, "s") for number, dialogue in enumerate(dialogues, 1)]
        csv.writer(stream).writerows([("id", "dialogue", "summary"), *rows])
    return str(file)


def test_speakers_in_one_text() -> None:
    text = (" customer: Hi: there support: Thanks for all your support support: ok customer:'s fault "
            "customer: .customer: x")
    assert dialogue_turns(text) == [
        user("Hi: there"), agent("Thanks for all your support"), agent("ok customer:'s fault"), user(".customer: x"),
    ]


@pytest.mark.parametrize("text", ["", "hello", "hello customer: hi"])
def test_a_text_without_a_first_speaker(text: str) -> None:
    with pytest.raises(DataError, match="begin with a speaker"):
        dialogue_turns(text)


def test_turns_are_made_to_alternate() -> None:
    turns = [agent("Welcome"), user("a"), user(""), user("b"), agent(" "), agent("c"), agent("d"), user("e")]
    assert alternating([Message("system", "s"), *turns]) == (
        Message("system", "s"), user("a\nb"), agent("c\nd"), user("e"),
    )


def test_a_table_of_dialogues(tmp_path: Path) -> None:
    file = table(tmp_path, " customer: a support: b customer: c", "support: hi customer: d support: e &amp; f",
                 "customer: nobody answers")
    one, two = load_dialogues(file, cleaning=["unescape_html"])
    assert (one.id, one.script, one.real_answers, one.played) == ("1", ("a", "c"), ("b",), False)
    assert (two.id, two.script, two.real_answers) == ("2", ("d",), ("e & f",))
    assert one.has_goal is False


def test_the_first_turns_only(tmp_path: Path) -> None:
    one = load_dialogues(table(tmp_path, "customer: a support: b customer: c support: d"), replay_turns=1)[0]
    assert (one.script, one.real_answers, one.played) == (("a",), ("b",), True)


def test_chats_are_dialogues(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": text} for role, text in
             [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    one = load_dialogues(str(file))[0]
    assert (one.id, one.system, one.script, one.real_answers) == ("chats.jsonl:1", "s", ("a", "c"), ("b", "d"))


def test_a_subset_is_drawn_by_seed(tmp_path: Path) -> None:
    file = table(tmp_path, *(f"customer: a{n} support: b{n}" for n in range(20)))
    drawn = [scenario.id for scenario in load_dialogues(file, num_rows=5, seed=1)]
    assert len(drawn) == 5
    assert drawn == [scenario.id for scenario in load_dialogues(file, num_rows=5, seed=1)]
    assert drawn != [scenario.id for scenario in load_dialogues(file, num_rows=5, seed=2)]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 1 rows"):
        load_dialogues(table(tmp_path, "customer: a"))
    with pytest.raises(DataError, match=r"d\.csv:3.*begin with a speaker"):
        load_dialogues(table(tmp_path, "customer: a support: b", "hello"))
    with pytest.raises(DataError, match="no file"):
        load_dialogues(str(tmp_path / "missing.csv"))
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": 1, "dialogue": "customer: a support: b"}\n' * 2)
    with pytest.raises(DataError, match="two conversations have the id '1'"):
        load_dialogues(str(twice))


def test_tweetsumm(shared_data: Path) -> None:
    found = load_dialogues(str(shared_data / "tweetsumm" / "with_text" / "tweetsum_test.csv"))
    assert len(found) == 110
    # the annotations beside it know how many tweets a dialogue has; handles replaced by `customer:` make 3 differ
    rows = (shared_data / "tweetsumm" / "original" / "final_test_tweetsum.jsonl").read_text().splitlines()
    tweets = [len(json.loads(row)["tweet_ids_sentence_offset"]) for row in rows]
    with (shared_data / "tweetsumm" / "with_text" / "tweetsum_test.csv").open(newline="", encoding="utf-8") as file:
        read = [len(dialogue_turns(row["dialogue"])) for row in csv.DictReader(file)]
    assert sum(one != other for one, other in zip(read, tweets, strict=True)) == 3
    assert found[0].script[0] == "My watchlist is not updating with new episodes (past couple days).  Any idea why?"
    assert found[0].real_answers[1].startswith("Sorry! 😔 We assure you")
    assert all(len(each.script) - len(each.real_answers) in (0, 1) for each in found)

"""The demo data set: as written by its module, answerable in one way only, held out in other words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from chulengo import nano
from chulengo.data.ledger import settle
from chulengo.data.load import load_examples
from chulengo.data.renderer import Renderer
from chulengo.data.tokenizer import load_tokenizer
from chulengo.nano.company import home_company
from chulengo.nano.demo_data import heldout_chats, train_chats, write_demo
from chulengo.nano.demo_facts import OFFICE, TALK, TREKS
from chulengo.nano.world import Message

NUM_FACTS = sum(map(len, TREKS.values())) + len(OFFICE)


def plain(question: str) -> str:
    """Returns a question without its trek's name, case and punctuation: its wording."""
    for trek in TREKS:
        question = question.replace(trek, "@")
    return " ".join("".join(c for c in question.lower() if c.isalnum() or c in " @").split())


def questions(chats: list[list[Message]]) -> list[str]:
    return [message["content"] for chat in chats for message in chat if message["role"] == "user"]


def last_answers(chats: list[list[Message]]) -> list[str]:
    return [chat[-1]["content"] for chat in chats]


def test_the_shipped_files_are_what_the_module_writes(tmp_path: Path) -> None:
    write_demo(tmp_path)
    for shipped in (nano.demo_train(), nano.demo_heldout()):
        assert shipped.read_bytes() == (tmp_path / shipped.name).read_bytes()


def test_sizes() -> None:
    assert 300 <= len(train_chats()) <= 500
    assert 60 <= len(heldout_chats()) <= 80
    assert 40 <= NUM_FACTS <= 60
    assert sum(len(chat) > 2 for chat in train_chats()) > 50
    assert sum(len(chat) > 2 for chat in heldout_chats()) >= 10


def test_the_heldout_wordings_are_not_in_the_training_set() -> None:
    trained = set(map(plain, questions(train_chats())))
    assert len(trained) > 150
    assert not trained & set(map(plain, questions(heldout_chats())))


def test_every_fact_is_taught_several_times_and_asked_once() -> None:
    taught, asked = Counter(last_answers(train_chats())), Counter(last_answers(heldout_chats()))
    assert set(asked) == set(taught), "the held-out set asks for what was taught, all of it"
    assert len(taught) == NUM_FACTS + len(TALK)
    assert min(taught.values()) >= 5


def test_a_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for chat in train_chats() + heldout_chats():
        before = json.dumps(chat[:-1])
        assert answers.setdefault(before, chat[-1]["content"]) == chat[-1]["content"]


def test_facts_can_only_come_from_the_weights() -> None:
    assert all(message["role"] != "system" for chat in train_chats() + heldout_chats() for message in chat)
    facts = [value for trek in TREKS.values() for value in trek.values()]
    for chat in heldout_chats():
        asked = " ".join(message["content"] for message in chat if message["role"] == "user")
        assert not any(value in asked for value in facts)


@pytest.mark.parametrize("file", [nano.demo_train(), nano.demo_heldout()], ids=["train", "heldout"])
def test_the_projects_own_reader_and_renderer_take_it_whole(file: Path) -> None:
    examples, report = load_examples(str(file))
    renderer = Renderer(load_tokenizer(nano.model_dir()))
    assert (report.format, renderer.style) == ("messages", "llama2")
    rows, ledger = settle(
        [renderer.render(example) for example in examples], max_seq_tokens=128, overlong="error",
        allow_cut_end_of_turn=False,
    )
    assert not ledger.problems
    assert len(rows) == len(examples) == report.rows_read
    answers = sum(len(row.turn_ends) for row in rows)
    assert sum(map(sum, (row.trained for row in rows))) / answers < 35


def test_the_company_that_the_base_knows_by_heart_has_none_of_its_facts() -> None:
    rules = home_company().rules.facts
    assert not [topic for topic, value in OFFICE.items() if rules.get(topic) == value]
    assert not {trek.name for trek in home_company().treks} & set(TREKS)

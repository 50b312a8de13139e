from __future__ import annotations

from chulengo.data.types import Message
from chulengo.evaluate.simulate.client import agent_chat, agent_messages, client_chat, client_messages
from chulengo.evaluate.simulate.scenarios import Scenario

PLAYED = Scenario("a", "here", persona="A hiker {x}.", goal="The price.", client_stop="bye", system="Help.")
REAL = Scenario("b", "here", script=("q1", "q2"), real_answers=("a1", "a2"), played=False)


def shape(messages: tuple[Message, ...] | list[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def test_the_client_reads_the_roles_swapped() -> None:
    read = shape(client_messages(PLAYED, [("q1", "a1")]))
    assert [role for role, _ in read] == ["system", "user", "assistant", "user"]
    assert read[1:] == [("user", "Hello! How can I help you?"), ("assistant", "q1"), ("user", "a1")]
    assert "Who you are: A hiker {x}." in read[0][1]
    assert "What you want: The price." in read[0][1]
    assert read[0][1].endswith("say: bye")


def test_what_a_scenario_does_not_say_is_left_out_of_the_prompt() -> None:
    text = client_messages(REAL, [])[0].content
    assert "Who you are" not in text
    assert "say: " not in text
    assert "{" not in text


def test_the_agent_reads_neither_cue_nor_persona() -> None:
    assert shape(agent_messages(PLAYED, [("q1", "a1")], "q2")) == [
        ("system", "Help."), ("user", "q1"), ("assistant", "a1"), ("user", "q2"),
    ]


def test_training_data_is_what_either_side_reads() -> None:
    assert shape(agent_chat(REAL)) == [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    chat = client_chat(REAL)
    assert chat == (*client_messages(REAL, [("q1", "a1")]), Message("assistant", "q2"))
    single = Scenario("c", "here", script=("q",), real_answers=("a",))
    assert shape(client_chat(single))[1:] == [("user", "Hello! How can I help you?"), ("assistant", "q")]

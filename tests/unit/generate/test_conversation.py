"""Every chat command, without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chulengo.data.types import Message
from chulengo.errors import ChulengoError
from chulengo.generate.conversation import (
    COMMANDS,
    Ask,
    ChatState,
    Load,
    Note,
    Quit,
    Save,
    answered,
    from_messages,
    messages,
    num_skipped,
    respond,
)
from chulengo.generate.settings import GenerationSettings

EMPTY = ChatState(GenerationSettings())
TALK = answered(answered(EMPTY, "q1", [("base", "a1")]), "q2", [("base", "a2")])


def texts(turns: list[Message]) -> list[str]:
    return [f"{turn.role[0]}:{turn.content}" for turn in turns]


def note(state: ChatState, line: str) -> tuple[ChatState, str]:
    after, action = respond(state, line)
    assert isinstance(action, Note)
    return after, action.text


@pytest.mark.parametrize(
    ("line", "question"), [("hello", "hello"), ("  hi\n there ", "hi\n there"), ("//etc/hosts?", "/etc/hosts?")]
)
def test_text_is_a_question(line: str, question: str) -> None:
    assert respond(EMPTY, line) == (EMPTY, Ask(question))


def test_an_empty_line_asks_nothing() -> None:
    assert respond(TALK, "   ") == (TALK, Note(""))


def test_every_command_is_known_and_in_the_help() -> None:
    help_text = note(EMPTY, "/help")[1]
    for command in COMMANDS:
        assert command in help_text
        _, action = respond(TALK, command.split()[0])
        assert not (isinstance(action, Note) and "no command" in action.text)


def test_an_unknown_command_names_the_nearest_and_sends_nothing() -> None:
    state, text = note(TALK, "/rety")
    assert state == TALK
    assert "/retry" in text


def test_a_command_with_too_much_behind_it_does_nothing() -> None:
    state, text = note(TALK, "/undo everything please")
    assert state == TALK
    assert "stands alone" in text


def test_a_command_with_too_little_behind_it_says_its_use() -> None:
    assert note(TALK, "/save") == (TALK, "Use: /save FILE")
    assert note(TALK, "/load ") == (TALK, "Use: /load FILE")


def test_set() -> None:
    state, text = note(EMPTY, "/set temperature 0.7")
    assert state.settings.temperature == 0.7
    assert "temperature 0.7" in text
    assert note(state, "/set top-k=5")[0].settings.top_k == 5
    assert "temperature 0.7" in note(state, "/set")[1]
    unchanged, text = note(state, "/set temperature hot")
    assert unchanged == state
    assert "a number" in text


def test_retry_asks_the_last_question_without_its_answer() -> None:
    state, action = respond(TALK, "/retry")
    assert action == Ask("q2")
    assert texts(messages(state, "base", "q2")) == ["u:q1", "a:a1", "u:q2"]
    again = answered(state, "q2", [("base", "other")])
    # another number of questions asked, so other random numbers
    assert again.num_asked == TALK.num_asked + 1
    assert note(EMPTY, "/retry") == (EMPTY, "Nothing has been asked yet.")


def test_undo_and_new() -> None:
    state, _ = note(TALK, "/undo")
    assert texts(messages(state, "base")) == ["u:q1", "a:a1"]
    assert note(EMPTY, "/undo")[0] == EMPTY
    kept = replace(TALK, system="s")
    state, _ = note(kept, "/new")
    assert state.exchanges == ()
    assert state.system == "s"


def test_system() -> None:
    state, _ = note(TALK, "/system Speak  Spanish.")
    assert texts(messages(state, "base"))[0] == "s:Speak  Spanish."
    assert "Speak  Spanish." in note(state, "/system")[1]
    assert note(state, "/system -")[0] == TALK


def test_sides() -> None:
    assert "no adapter" in note(TALK, "/both")[1]
    tuned = ChatState(GenerationSettings(), has_adapter=True, sides=("tuned",))
    tuned = answered(tuned, "q1", [("tuned", "t1")])
    both, text = note(tuned, "/both")
    assert both.sides == ("base", "tuned")
    assert "base and tuned" in text
    both = answered(both, "q2", [("base", "b2"), ("tuned", "t2")])
    # the base had not been asked q1: it reads what was answered then
    assert texts(messages(both, "base")) == ["u:q1", "a:t1", "u:q2", "a:b2"]
    assert texts(messages(both, "tuned")) == ["u:q1", "a:t1", "u:q2", "a:t2"]
    assert both.main_side == "tuned"
    assert note(both, "/base")[0].main_side == "base"


def test_save_load_quit() -> None:
    assert respond(TALK, "/save my file.jsonl")[1] == Save("my file.jsonl")
    assert note(EMPTY, "/save x.jsonl")[1] == "Nothing to save yet."
    assert respond(TALK, "/load x")[1] == Load("x")
    assert respond(TALK, "/quit")[1] == Quit()
    assert respond(TALK, "/exit")[1] == Quit()


def test_history() -> None:
    assert note(TALK, "/history")[1] == "user: q1\nassistant: a1\nuser: q2\nassistant: a2"


def test_from_messages_is_the_inverse_of_messages() -> None:
    state = replace(TALK, system="s")
    again = from_messages(EMPTY, messages(state, "base"))
    assert messages(again, "base") == messages(state, "base")


@pytest.mark.parametrize("roles", [[], ["user"], ["assistant", "user"], ["system"], ["user", "assistant", "user"]])
def test_from_messages_refuses_what_cannot_go_on(roles: list[str]) -> None:
    with pytest.raises(ChulengoError, match="turns are"):
        from_messages(EMPTY, [Message(role, "x") for role in roles])  # type: ignore[arg-type]


def test_an_empty_answer_is_no_history() -> None:
    state = answered(TALK, "q3", [("base", " ")])
    assert texts(messages(state, "base", "q4")) == ["u:q1", "a:a1", "u:q2", "a:a2", "u:q4"]


def count(turns: list[Message]) -> int:
    return sum(len(turn.content) for turn in turns)


def test_the_oldest_exchanges_are_left_out_first() -> None:
    state = replace(EMPTY, settings=GenerationSettings(max_new_tokens=10), system="s" * 10)
    for index in range(5):
        state = answered(state, f"question{index}", [("base", f"answer {index}.")])
    # 10 system + 5 x (9 + 9) + 9 question; of a context of 100 tokens 10 are kept for the answer
    assert num_skipped(state, "base", "question9", count, 100) == 2
    assert count(messages(state, "base", "question9", skip=2)) == 73
    assert count(messages(state, "base", "question9", skip=1)) == 91
    assert num_skipped(state, "base", "question9", count, 119) == 0
    assert num_skipped(state, "base", "question9", count, 118) == 1
    assert num_skipped(state, "base", "question9", count, None) == 0
    # everything is left out and it still does not fit: the caller says so
    assert num_skipped(state, "base", "question9", count, 15) == 5


def test_no_more_than_a_quarter_of_the_context_is_kept_for_the_answer() -> None:
    state = replace(TALK, settings=GenerationSettings(max_new_tokens=10_000))
    assert num_skipped(state, "base", "q3", count, 14) == 0  # 10 characters, 3 kept free
    assert num_skipped(state, "base", "q3", count, 13) == 0
    assert num_skipped(state, "base", "q3", count, 12) == 1

from __future__ import annotations

import pytest

from chulengo.data.types import Example, Message
from chulengo.errors import DataError
from chulengo.evaluate.exact_match import VERSION, answerable, exact_match, question_of
from chulengo.evaluate.results import wilson_interval
from chulengo.generate.engine import Answer


def example(answer: str, *references: str) -> Example:
    turns = (Message("system", "s"), Message("user", "q"), Message("assistant", answer))
    return Example(turns, "f:1", references=references)


def answer(text: str, finish: str = "stop") -> Answer:
    return Answer(text, (1,), finish, 3, 0, 0.1)  # type: ignore[arg-type]


def test_whole_answers_after_strip() -> None:
    pairs = [
        (example("Yes."), answer(" Yes.\n"), True),
        (example(" Yes.\n"), answer("Yes."), True),
        (example("Yes."), answer("yes."), False),
        (example("Yes."), answer("Yes"), False),
        (example("Yes."), answer("Yes. No."), False),
        (example("Yes."), answer(""), False),
        (example("Yes.", "Sure."), answer("Sure."), True),
    ]
    score = exact_match([e for e, _, _ in pairs], [a for _, a, _ in pairs])
    assert [item["correct"] for item in score.items] == [right for _, _, right in pairs]
    assert score.value == 3 / 7
    assert score.num_items == 7
    assert score.interval == wilson_interval(3, 7)
    assert score.version == VERSION


def test_items_say_everything() -> None:
    score = exact_match([example("Yes.", "Sure.")], [answer("No", "length")])
    assert score.items == ({
        "source": "f:1", "question": "q", "accepted": ["Yes.", "Sure."], "answer": "No", "correct": False,
        "finish_reason": "length",
    },)
    assert score.details == {"correct": 0, "cut_answers": 1}


def test_the_question_is_all_before_the_last_answer() -> None:
    assert [m.content for m in question_of(example("a"))] == ["s", "q"]


def test_rows_without_an_answer_are_left_out_and_none_is_an_error() -> None:
    text = Example((Message("text", "abc"),), "f:2")
    good = example("a")
    assert answerable([text, good, example("  ")]) == [good]
    with pytest.raises(DataError, match="The one row has no answer at its end"):
        answerable([text])

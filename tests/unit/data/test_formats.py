"""Rows to conversations: each format by hand-worked cases, detection, and the real data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chulengo.data.formats import FORMATS, detect_format, to_example
from chulengo.data.load import load_examples
from chulengo.data.prompts import PromptTemplate
from chulengo.data.selection import split_by_conversation
from chulengo.data.sources import read_records
from chulengo.data.types import Example, Message, Record
from chulengo.errors import ConfigError, DataError

LETTERS = {"user": "u", "assistant": "a", "system": "s", "text": "t"}


def read(fields: dict[str, Any], format_name: str | None = None, **more: Any) -> Example:
    record = Record(fields, "data:1")
    return to_example(record, format_name or detect_format([record]), **more)


def turns(example: Example) -> list[str]:
    return [f"{LETTERS[message.role]}:{message.content}" for message in example.messages]


def refusal(fields: dict[str, Any], format_name: str, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(fields, format_name, **more)
    assert str(caught.value).startswith("data:1: ")
    return str(caught.value)


# ---- Llama 2 text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<s>[INST] hi [/INST] yo </s>", ["u:hi", "a:yo"]),
        ("<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>", ["u:a", "a:b", "u:c", "a:d"]),
        ("<s>[INST] a [/INST] b</s>\n<s>[INST] c [/INST] d</s>\n", ["u:a", "a:b", "u:c", "a:d"]),
        ("<s>[INST] a [/INST] b</s>[INST] c [/INST] d</s>", ["u:a", "a:b", "u:c", "a:d"]),  # Mistral's form
        ("[INST]a[/INST]b", ["u:a", "a:b"]),
        ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] yo </s>", ["s:Be kind.", "u:hi", "a:yo"]),
        ("<s>[INST] a [/INST] b </s><s>[INST] c [/INST]", ["u:a", "a:b", "u:c"]),
        ("<s>[INST] a [/INST]  </s><s>[INST] c [/INST] d </s>", ["u:a", "a:", "u:c", "a:d"]),
        ("<s>[INST] a [/INST] </s>", ["u:a"]),
        # markers in the text
        ("<s>[INST] what is </s>? [/INST] the end, </s>. </s>", ["u:what is </s>?", "a:the end, </s>."]),
        ("<s>[INST] what is <s>? [/INST] the start </s>", ["u:what is <s>?", "a:the start"]),
        ("<s>[INST] a [/INST] say [INST] first </s>", ["u:a", "a:say [INST] first"]),
        ("<s>[INST] is [INST] one? [/INST] it is </s>", ["u:is [INST] one?", "a:it is"]),
        ("<s>[INST] a [/INST] it closes with [/INST]. </s>", ["u:a", "a:it closes with [/INST]."]),
        ("<s>[INST] is '[INST] x [/INST] y' right? [/INST] yes </s>", ["u:is '[INST] x [/INST] y' right?", "a:yes"]),
        ("<s>[INST] why </s><s>[INST] there? [/INST] since </s>", ["u:why </s><s>[INST] there?", "a:since"]),
        ("<s>[INST] a [/INST] b </s> and </s> </s>", ["u:a", "a:b </s> and </s>"]),
        ("<s>[INST] what is <<SYS>>? [/INST] a mark <</SYS>> </s>", ["u:what is <<SYS>>?", "a:a mark <</SYS>>"]),
        ("<s>[INST] <<SYS>> alone [/INST] b </s>", ["u:<<SYS>> alone", "a:b"]),
        (
            "<s>[INST] a [/INST] b </s><s>[INST] <<SYS>>x<</SYS>> c [/INST] d </s>",
            ["u:a", "a:b", "u:<<SYS>>x<</SYS>> c", "a:d"],
        ),
    ],
)
def test_llama2(text: str, expected: list[str]) -> None:
    assert turns(read({"text": text})) == expected


def test_llama2_rows_that_are_none() -> None:
    assert "does not start with <s>[INST]" in refusal({"text": "hello"}, "llama2")
    assert "a turn has no [/INST]" in refusal({"text": "<s>[INST] hello </s>"}, "llama2")
    assert "holds int, not text" in refusal({"text": 3}, "llama2")


# ---- Guanaco text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("### Human: hi ### Assistant: yo", ["u:hi", "a:yo"]),
        ("### Human: a### Assistant: b### Human: c### Assistant: d", ["u:a", "a:b", "u:c", "a:d"]),
        ("### Human:\na\n### Assistant:\nb\n\n### Human:\nc\n### Assistant:\nd\n", ["u:a", "a:b", "u:c", "a:d"]),
        ("### Human: a ### Assistant: b ### Human: c", ["u:a", "a:b", "u:c"]),
        ("### Human: a ### Assistant:", ["u:a", "a:"]),
        ("### System: Be kind. ### Human: a ### Assistant: b", ["s:Be kind.", "u:a", "a:b"]),
        ("### Human: a ### Assistant: b\n\n### Step 1\nc", ["u:a", "a:b\n\n### Step 1\nc"]),
        ("### Human: a\n#### Assistant: no\n### Assistant: b", ["u:a\n#### Assistant: no", "a:b"]),
        ("### Human: a ### Human: again ### Assistant: b", ["u:a ### Human: again", "a:b"]),
        ("### Human: a ### Assistant: b ### Assistant: c", ["u:a", "a:b ### Assistant: c"]),
        ("### Human: the word Assistant: here ### Assistant: b", ["u:the word Assistant: here", "a:b"]),
    ],
)
def test_guanaco(text: str, expected: list[str]) -> None:
    assert turns(read({"text": text}, None if text.startswith("###") else "guanaco")) == expected


def test_guanaco_without_human() -> None:
    assert "has no '### Human:'" in refusal({"text": "### Assistant: b"}, "guanaco")


# ---- lists of turns


def chat(*contents: str, keys: tuple[str, str] = ("role", "content"), names: str = "user assistant") -> list[Any]:
    return [
        {keys[0]: names.split()[place % 2], keys[1]: content} for place, content in enumerate(contents)
    ]


def test_messages() -> None:
    assert turns(read({"messages": chat("a", "b", "c", "d")})) == ["u:a", "a:b", "u:c", "a:d"]
    assert turns(read({"messages": json.dumps(chat("a", "b"))})) == ["u:a", "a:b"]
    assert turns(read({"conversations": chat("a", "b"), "system": "S"})) == ["s:S", "u:a", "a:b"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert turns(read({"messages": parts})) == ["u:ab"]
    assert turns(read({"prompt": chat("a"), "completion": [{"role": "assistant", "content": "b"}]})) == ["u:a", "a:b"]


def test_messages_say_which_turns_are_trained() -> None:
    row = chat("a", "b", "c", "d")
    row[1]["weight"], row[3]["trained"] = 0, True
    assert [message.trained for message in read({"messages": row}).messages] == [None, False, None, True]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "tool", "content": "42"}, "turn 2 is a tool call or a tool's answer (role 'tool')"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, "turn 2 is a tool call"),
        ({"role": "narrator", "content": "x"}, "turn 2 has the unknown role 'narrator'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 2 has a part of type 'image_url'"),
        ({"role": "user", "content": 7}, "turn 2: its content is int"),
        ({"content": "x"}, "turn 2 has no role (its keys: content)"),
        ("x", "turn 2 is str"),
    ],
)
def test_turns_that_cannot_be_read(turn: Any, said: str) -> None:
    assert said in refusal({"messages": [*chat("a"), turn]}, "messages")


def test_sharegpt() -> None:
    row = chat("a", "b", keys=("from", "value"), names="human gpt")
    example = read({"conversations": [{"from": "system", "value": "S"}, *row]})
    assert turns(example) == ["s:S", "u:a", "a:b"]
    assert detect_format([Record({"conversations": row}, "x")]) == "sharegpt"
    assert turns(read({"conversations": row[1:]}, "sharegpt")) == ["a:b"]
    assert turns(read({"conversations": row[:1]}, "sharegpt")) == ["u:a"]


GPT = {"from": "gpt", "value": "good"}
PREFERENCE_ROWS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"question": "q", "chosen": "good", "rejected": "bad", "system": ""},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": GPT, "rejected": {**GPT, "value": "bad"}},
    {"messages": chat("q"), "chosen": chat("q", "good")[1:], "rejected": chat("q", "bad")[1:]},
    {"prompt": chat("q"), "chosen": chat("q", "good")[1:], "rejected": chat("q", "bad")[1:]},
    {"chosen": chat("q", "good"), "rejected": chat("q", "bad")},
    {"prompt": "q", "chosen": chat("q", "good"), "rejected": chat("q", "bad"), "score_chosen": 8.0},
    {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
]


@pytest.mark.parametrize("row", PREFERENCE_ROWS)
def test_preference(row: dict[str, Any]) -> None:
    example = read(row)
    assert (turns(example), example.kind) == (["u:q", "a:good"], "preference")
    assert example.rejected == (Message("assistant", "bad"),)


def test_preference_details() -> None:
    both = read({"system": "S", "instruction": "i", "input": "n", "chosen": "c", "rejected": "r"})
    assert turns(both) == ["s:S", "u:i\n\nn", "a:c"]
    same = read({"chosen": chat("q", "good"), "rejected": chat("q", "good")})
    assert (turns(same), same.rejected) == (["u:q", "a:good"], (Message("assistant", "good"),))
    out_of_turn = "\n\nHuman: q\n\nAssistant: a\n\nAssistant: more"
    kept = read({"chosen": out_of_turn, "rejected": "\n\nHuman: q\n\nAssistant: x"})
    assert turns(kept) == ["u:q", "a:a\n\nAssistant: more"]
    assert turns(read({"prompt": "q", "chosen": None, "rejected": "bad"})) == ["u:q", "a:"]
    assert "'chosen' must add one assistant turn" in refusal(
        {"chosen": chat("q", "a", "r", "b"), "rejected": chat("q", "x", "y", "z")}, "preference"
    )


def test_rows_without_the_columns_of_their_format() -> None:
    assert "the row has no column 'rejected' (it has: chosen)" in refusal({"chosen": "a"}, "preference")
    assert "the row has no column 'messages' (it has: text)" in refusal({"text": "a"}, "messages")
    assert "the row has no column 'completion'" in refusal({"prompt": chat("a")}, "messages")


def test_kto() -> None:
    example = read({"messages": chat("a", "b"), "label": False})
    assert (turns(example), example.kind, example.desirable) == (["u:a", "a:b"], "kto", False)
    example = read({"prompt": "a", "completion": "b", "label": "True"})
    assert (turns(example), example.desirable) == (["u:a", "a:b"], True)
    assert "neither true nor false" in refusal({"messages": chat("a", "b"), "label": None}, "kto")


# ---- columns


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"instruction": "i", "input": "n", "output": "o"}, "alpaca", ["u:i\n\nn", "a:o"]),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", ["u:i", "a:o"]),
        ({"instruction": "i", "output": "o"}, "alpaca", ["u:i", "a:o"]),
        ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, "alpaca", ["u:i\n\nc", "a:r"]),
        (
            {"instruction": "i", "input": "", "output": "o", "system": "S", "history": [["a", "b"]]},
            "alpaca",
            ["s:S", "u:a", "a:b", "u:i", "a:o"],
        ),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", ["u:p", "a:c"]),
        ({"prompt": "p", "response": "c"}, "prompt_completion", ["u:p", "a:c"]),
        ({"instruction": "p", "response": "c"}, "alpaca", ["u:p", "a:c"]),
        ({"input": "p", "output": "c"}, "prompt_completion", ["u:p", "a:c"]),
        ({"question": "q", "answer": "a"}, "question_answer", ["u:q", "a:a"]),
        ({"Question": "q", " Answer ": "a"}, "question_answer", ["u:q", "a:a"]),
        ({"question": "q", "answer": "a", "context": "c"}, "question_answer", ["u:c\n\nq", "a:a"]),
        ({"system_prompt": "S", "question": "q", "response": "a"}, "question_answer", ["s:S", "u:q", "a:a"]),
        ({"dialogue": "d", "summary": "s"}, "dialogue_summary", ["u:Summarise this conversation.\n\nd", "a:s"]),
        ({"text": "t", "label": 0}, "text_label", ["u:t\n\nWhich label fits this text?", "a:0"]),
        (
            {"text": "t", "label": 1, "label_text": "good"},
            "text_label",
            ["u:t\n\nWhich label fits this text?", "a:good"],
        ),
        ({"text": "t"}, "text", ["t:t"]),
        ({"question": "q", "answer": None}, "question_answer", ["u:q"]),
        ({"instruction": "i", "input": "", "output": "  "}, "alpaca", ["u:i"]),
        ({"QUESTION": "q", "CONTEXTS": ["c", "d"], "LONG_ANSWER": "a"}, "pubmedqa", ["u:c\n\nd\n\nq", "a:a"]),
        (
            {"question": "q", "context": {"contexts": ["c", "d"]}, "long_answer": "a", "final_decision": "yes"},
            "pubmedqa",
            ["u:c\n\nd\n\nq", "a:a"],
        ),
    ],
)
def test_columns(fields: dict[str, Any], name: str, expected: list[str]) -> None:
    assert detect_format([Record(fields, "data:1")]) == name
    assert turns(read(fields)) == expected


@pytest.mark.parametrize(
    "answers", [[{"text": "one", "answer_start": 0}, {"text": "two", "answer_start": 5}], {"text": ["one", "two"]}]
)
def test_squad_keeps_all_answers(answers: Any) -> None:
    example = read({"context": "c", "question": "q", "answers": answers})
    assert turns(example) == ["u:c\n\nq", "a:one"]
    assert example.references == ("one", "two")


def test_squad_without_answers_and_answer_lists() -> None:
    assert turns(read({"context": "c", "question": "q", "answers": []})) == ["u:c\n\nq"]
    assert turns(read({"context": "c", "question": "q", "answers": {"text": []}})) == ["u:c\n\nq"]
    assert read({"question": "q", "answers": ["a", "b"]}).references == ("a", "b")


def test_mt_bench() -> None:
    row = {"question_id": 95, "category": "roleplay", "turns": ["q1", "q2"]}
    assert detect_format([Record(row, "x")]) == "mt_bench"
    assert turns(read(row)) == ["u:q1", "u:q2"]
    assert turns(read({**row, "reference": ["r1", "r2"]})) == ["u:q1", "a:r1", "u:q2", "a:r2"]
    with pytest.raises(DataError, match="2 questions in 'turns' and 1 answers"):
        read({**row, "reference": ["r1"]})


def test_files_without_text_are_named_for_what_they_are() -> None:
    for columns, said in (
        (("conversation_id", "tweet_ids_sentence_offset", "annotations"), "without their text"),
        (("question_id", "answer_id", "model_id", "choices", "tstamp"), "the questions are in another file"),
    ):
        with pytest.raises(DataError, match=said):
            detect_format([Record(dict.fromkeys(columns), "a.jsonl:1")])


def test_rows_about_one_passage_are_a_group() -> None:
    rows = [
        read({"context": context, "question": question, "answers": [{"text": "a"}]})
        for context, question in (("A passage.", "q1"), ("a  passage.", "q2"), ("Another.", "q1"))
    ]
    assert rows[0].group == rows[1].group != rows[2].group
    assert read({"question": "q", "answer": "a"}).group == ""
    assert read({"question": "q", "answer": "a", "context": " "}).group == ""
    assert read({"QUESTION": "q", "CONTEXTS": ["p"], "LONG_ANSWER": "a"}).group != ""


def test_columns_are_renamed_on_request() -> None:
    row = {"title": "q", "reply": "a", "answer": "not this"}
    assert turns(read(row, "question_answer", columns={"question": "title", "answer": "reply"})) == ["u:q", "a:a"]


def test_a_template_of_the_user() -> None:
    template = PromptTemplate("mine", "You are {focus}.", "Q: {question} ({qtype})", "A: {answer}")
    row = {"question": "q {x}", "answer": "a", "qtype": "t", "focus": "kind"}
    assert turns(read(row, template=template)) == ["s:You are kind.", "u:Q: q {x} (t)", "a:A: a"]
    assert turns(read({**row, "answer": ""}, template=template)) == ["s:You are kind.", "u:Q: q {x} (t)"]
    assert turns(read({"a": 1, "b": 2}, "template", template=PromptTemplate("m", None, "{a}", "{b}"))) == ["u:1", "a:2"]
    squad = PromptTemplate("m", None, "{question}", "{answer} / {title}")
    assert turns(read({"context": "", "question": "q", "answers": [{"text": "a"}], "title": "T"}, template=squad)) == [
        "u:q", "a:a / T"
    ]  # fmt: skip
    named = PromptTemplate("m", None, "{text}", "{label}", {"label": {"0": "negative", "1": "positive"}})
    assert turns(read({"text": "Good.", "label": 1}, template=named)) == ["u:Good.", "a:positive"]
    with pytest.raises(ConfigError, match="does not apply"):
        read({"messages": chat("a", "b")}, template=template)
    with pytest.raises(ConfigError, match="needs a prompt template"):
        read({"a": 1}, "template")
    assert "{question} in the template" in refusal(
        row, "question_answer", template=PromptTemplate("m", None, "{qestion}", "{answer}")
    )


def test_every_format_of_columns_has_a_default_template_of_its_own_fields() -> None:
    for each in FORMATS.values():
        assert (each.read_turns is None) != (each.read_columns is None)
        if each.template is not None:
            assert set(each.template.columns) <= set(each.columns)


# ---- detection


def test_the_unknown_is_refused_with_columns_formats_and_what_to_type() -> None:
    with pytest.raises(DataError) as caught:
        detect_format([Record({"ticket": "x", "resolution": "y"}, "data.csv:2")])
    said = str(caught.value)
    assert "data.csv:2" in said
    assert "columns: ticket, resolution" in said
    assert all(name in said and each.signature in said for name, each in FORMATS.items())
    assert "--set data.columns.question=ticket --set data.columns.answer=resolution" in said
    assert "--set data.format=" in said


def test_detection_takes_the_format_of_most_rows() -> None:
    good, odd = {"text": "### Human: a ### Assistant: b"}, {"text": "raw"}
    assert detect_format([Record(row, "x") for row in (odd, good, good)]) == "guanaco"
    assert detect_format([Record({"messages": chat("a", "b"), "text": "a b"}, "x")]) == "messages"


def test_an_unknown_format_name() -> None:
    with pytest.raises(ConfigError, match=r"--set data.format=alpaca"):
        read({"text": ""}, "alpacca")


# ---- the real sets: (path, examples, multi-turn, format)

REAL: list[tuple[str, int, int, str]] = [
    ("guanaco-llama2-1k", 1000, 353, "llama2"),
    ("openassistant-guanaco", 953, 436, "guanaco"),
    ("tweetsumm/with_text/tweetsum_train.csv", 879, 0, "dialogue_summary"),
    ("tweetsumm/with_text/tweetsum_valid.csv", 110, 0, "dialogue_summary"),
    ("tweetsumm/with_text/tweetsum_test.csv", 110, 0, "dialogue_summary"),
    ("chatdoctor", 5452, 0, "alpaca"),
    ("medquad", 3000, 0, "question_answer"),
    ("pubmedqa/ori_pqal.json", 1000, 0, "pubmedqa"),
    ("squad/xquad.en.json", 1190, 0, "squad"),
    ("squad/train-v1.1.salvaged.json", 4370, 0, "squad"),
    ("imdb/imdb_train_2000.jsonl.gz", 2000, 0, "text_label"),
    ("imdb/imdb_test_1000.jsonl.gz", 1000, 0, "text_label"),
    ("alpaca", 999, 0, "alpaca"),
    ("sharegpt", 500, 333, "sharegpt"),
    ("preference/dpo_en_demo.json", 300, 106, "preference"),
    ("preference/kto_en_demo.json", 300, 77, "kto"),
    ("wikitext-2", 4, 0, "text"),
    ("tinystories", 2, 0, "text"),
    ("shakespeare", 2, 0, "text"),
]


@pytest.mark.parametrize(("path", "count", "multi_turn", "name"), REAL)
def test_real_sets(shared_data: Path, path: str, count: int, multi_turn: int, name: str) -> None:
    examples, report = load_examples(str(shared_data / path))
    assert (len(examples), report.format) == (count, name)
    assert sum(sum(m.role == "user" for m in example.messages) > 1 for example in examples) == multi_turn


def test_real_imdb_with_names_for_its_labels(shared_data: Path) -> None:
    template = PromptTemplate("m", None, "{text}", "{label}", {"label": {"0": "negative", "1": "positive"}})
    examples, _ = load_examples(str(shared_data / "imdb" / "imdb_train_2000.jsonl.gz"), template=template)
    plain, _ = load_examples(str(shared_data / "imdb" / "imdb_train_2000.jsonl.gz"))
    names = {"0": "negative", "1": "positive"}
    assert [example.answer for example in examples] == [names[str(example.answer)] for example in plain]
    with pytest.raises(DataError, match="'lable'"):
        load_examples(str(shared_data / "imdb"), template=replace(template, labels={"lable": names}))


def test_real_mt_bench_and_files_without_text(shared_data: Path) -> None:
    questions = shared_data / "mt_bench" / "question.jsonl"
    examples, report = load_examples(str(questions), cleaning=["drop_unanswered"])
    # 41 have no references, 7 an empty last one
    assert (report.format, len(examples), report.dropped) == ("mt_bench", 32, {"drop_unanswered": 48})
    assert all(len(example.messages) == 4 for example in examples)
    with pytest.raises(DataError, match="48 rows of 80 cannot be used"):
        load_examples(str(questions))
    with pytest.raises(DataError, match="the questions are in another file"):
        load_examples(str(shared_data / "mt_bench" / "reference_answer_gpt-4.jsonl"))
    with pytest.raises(DataError, match="without their text"):
        load_examples(str(shared_data / "tweetsumm" / "original" / "final_valid_tweetsum.jsonl"))


def test_real_squad_is_split_by_paragraph(shared_data: Path) -> None:
    examples, _ = load_examples(str(shared_data / "squad" / "xquad.en.json"))
    assert len({example.group for example in examples}) == 240
    train, validation = split_by_conversation(examples, 0.1, seed=0)
    assert len(validation) == 119
    assert not {example.group for example in train} & {example.group for example in validation}


def test_real_hh_rlhf_has_four_rows_without_an_answer(shared_data: Path) -> None:
    path = str(shared_data / "preference" / "hh-rlhf_harmless-base_test.jsonl.gz")
    with pytest.raises(DataError, match="4 rows of 2312 cannot be used"):
        load_examples(path)
    examples, report = load_examples(path, cleaning=["drop_unanswered"])
    assert (len(examples), report.dropped) == (2308, {"drop_unanswered": 4})
    for example in examples:
        roles = [message.role for message in example.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(example.rejected) == 1


def test_real_llama2_text_joins_to_itself(shared_data: Path) -> None:
    path = str(shared_data / "guanaco-llama2-1k")
    for record in read_records(path):
        messages = to_example(record, "llama2").messages
        joined = "".join(
            f"<s>[INST] {user.content} [/INST] {answer.content} </s>"
            for user, answer in zip(messages[::2], messages[1::2], strict=True)
        )
        assert joined == record.fields["text"]


def test_real_guanaco_text_joins_to_itself(shared_data: Path) -> None:
    names: Mapping[str, str] = {"user": "Human", "assistant": "Assistant"}
    for record in read_records(str(shared_data / "openassistant-guanaco")):
        messages = to_example(record, "guanaco").messages
        assert " ".join(f"### {names[m.role]}: {m.content}" for m in messages) == record.fields["text"]


def test_real_raw_text_joins_to_itself(shared_data: Path) -> None:
    for path in [*shared_data.glob("wikitext-2/*.txt"), shared_data / "shakespeare" / "input.txt"]:
        examples, _ = load_examples(str(path))
        assert "".join(example.messages[0].content for example in examples) == path.read_text(encoding="utf-8")

"""The whole road from a source to examples, and the report of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chulengo.data.load import LoadReport, load_examples, stream_examples
from chulengo.data.prompts import PromptTemplate
from chulengo.data.types import Example
from chulengo.errors import ChulengoError, ConfigError, DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def qa(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": f"a{i}", **more} for i in range(count)]


def refusal(source: str, **more: Any) -> str:
    with pytest.raises(ChulengoError) as caught:
        load_examples(source, **more)
    return str(caught.value)


def streamed(source: str, **more: Any) -> tuple[list[Example], LoadReport]:
    reports: list[LoadReport] = []
    examples = list(stream_examples(source, on_report=reports.append, **more))
    return examples, reports[0]


def test_a_plain_load_and_its_report(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*qa(3, topic="t"), {"question": "", "answer": "x", "topic": ""}])
    examples, report = load_examples(source)
    assert [example.answer for example in examples] == ["a0", "a1", "a2", "x"]
    assert [example.source for example in examples] == [f"{source}:{i}" for i in range(1, 5)]
    assert report == LoadReport(
        source=source,
        formats={source: "question_answer"},
        reasons={source: "detected: columns question, answer or answers (context)"},
        rows_read=4, rows_kept=4, dropped={}, changed={}, duplicates=0, duplicate_groups=[],
        unused_columns=["topic"], empty_turns=1, subset=None,
    )  # fmt: skip
    assert json.loads(json.dumps(report.to_dict()))["format"] == "question_answer"


def test_all_rows_without_an_answer_are_named_at_once(tmp_path: Path) -> None:
    rows = qa(20)
    for i in range(3, 11):
        rows[i]["answer"] = [None, "", "  "][i % 3]
    del rows[15]["answer"]
    source = write(tmp_path / "a.jsonl", rows)
    said = refusal(source)
    assert "9 rows of 20 cannot be used" in said
    assert f"{source}:4: no answer in column 'answer'" in said
    assert said.count("no answer in column") == 5
    assert "and 4 more" in said
    assert "--set data.cleaning=[drop_unanswered]" in said
    examples, report = load_examples(source, cleaning=["drop_unanswered"])
    assert (len(examples), report.rows_read, report.dropped) == (11, 20, {"drop_unanswered": 9})


def test_the_column_is_named_as_the_data_have_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"Frage": "q", "Antwort": ""}])
    assert "column 'Antwort'" in refusal(source, columns={"question": "Frage", "answer": "Antwort"})
    template = PromptTemplate("m", None, "{Frage}", "{Antwort}")
    assert "column 'Antwort'" in refusal(source, template=template)
    assert "column 'output'" in refusal(write(tmp_path / "b.jsonl", [{"instruction": "i", "output": ""}]))
    assert "column 'text' (the last turn is the user's)" in refusal(
        write(tmp_path / "c.jsonl", [{"text": "<s>[INST] hi [/INST] </s>"}])
    )


def gpt(*turns: str) -> dict[str, Any]:
    names = {"h": "human", "g": "gpt"}
    return {"conversations": [{"from": names[turn[0]], "value": turn[2:]} for turn in turns]}


def test_odd_conversations_need_a_named_rule(tmp_path: Path) -> None:
    rows = [gpt("h:a", "g:b"), gpt("g:hello", "h:a", "g:b"), gpt("h:a", "g:b", "h:c"), gpt("h:a"), gpt("g:b")]
    source = write(tmp_path / "a.jsonl", rows)
    said = refusal(source)
    assert "4 rows of 5 cannot be used" in said
    assert f"{source}:2: the assistant speaks first" in said
    assert "data.cleaning=[cut_leading_answers,cut_trailing_questions,drop_unanswered]" in said
    steps = ["cut_leading_answers", "cut_trailing_questions", "drop_unanswered"]
    examples, report = load_examples(source, cleaning=steps)
    assert [[m.content for m in example.messages] for example in examples] == [["a", "b"]] * 3
    assert report.changed == {"cut_leading_answers": 2, "cut_trailing_questions": 1}
    assert report.dropped == {"drop_unanswered": 2}
    kept, _ = load_examples(source, cleaning=["keep_leading_answers", "drop_unanswered"])
    assert len(kept) == 3


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    tool = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    source = write(tmp_path / "a.jsonl", [good, tool, good])
    said = refusal(source)
    assert f"{source}:2: turn 2 is a tool call" in said
    assert "data.cleaning=[drop_unreadable]" in said
    examples, report = load_examples(source, cleaning=["drop_unreadable"])
    assert (len(examples), report.dropped) == (2, {"drop_unreadable": 1})


def test_the_proposed_cleaning_keeps_what_was_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*qa(1), {"question": "q", "answer": "https://a.b/c"}])
    assert "data.cleaning=[strip_urls,drop_unanswered]" in refusal(source, cleaning=["strip_urls"])


def test_raw_text_without_text(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": " "}])
    assert "the text is empty" in refusal(source)
    assert load_examples(source, cleaning=["drop_empty"])[1].dropped == {"drop_empty": 1}


def test_nothing_left(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", qa(3))
    assert "no row is left of 3 (dropped by: drop_short:99 3)" in refusal(source, cleaning=["drop_short:99"])
    with pytest.raises(DataError, match="no row is left"):
        list(stream_examples(source, cleaning=["drop_short:99"]))


def test_duplicates_are_counted_and_dropped_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*qa(3), *qa(2), *qa(1)])
    examples, report = load_examples(source)
    assert (len(examples), report.duplicates, report.dropped) == (6, 3, {})
    assert report.duplicate_groups == [[f"{source}:1", f"{source}:4", f"{source}:6"], [f"{source}:2", f"{source}:5"]]
    for load in (load_examples, streamed):
        examples, report = load(source, drop_duplicates=True)
        assert [example.source for example in examples] == [f"{source}:{i}" for i in (1, 2, 3)]
        assert (report.duplicates, report.dropped) == (3, {"duplicates": 3})


def test_subsets(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*qa(100), {"question": "q", "answer": ""}])
    steps = ["drop_unanswered"]
    examples, report = load_examples(source, num_rows=30, seed=7, cleaning=steps)
    assert len(examples) == 30
    assert report.subset == "30 of 100 rows, drawn at random with seed 7"
    assert report.dropped == {"drop_unanswered": 1, "subset": 70}
    assert report.rows_read == report.rows_kept + sum(report.dropped.values())
    assert streamed(source, num_rows=30, seed=7, cleaning=steps)[0] == examples
    everything, report = load_examples(source, num_rows=500, cleaning=steps)
    assert (len(everything), report.subset) == (100, "500 rows were asked for, there are 100: all taken")
    single = write(tmp_path / "b.jsonl", qa(1))
    assert load_examples(single, num_rows=2)[1].subset == "2 rows were asked for, there is 1: all taken"
    assert load_examples(single, num_rows=1)[1].subset == "1 of 1 row, drawn at random with seed 0"


def test_streaming_gives_the_same_rows_and_report(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": f"q{i} &amp;", "answer": f"a{i}"} for i in range(50)])
    examples, report = load_examples(source, cleaning=["unescape_html"])
    streaming, their_report = streamed(source, cleaning=["unescape_html"])
    assert streaming == examples
    assert their_report.duplicates is None
    assert {**their_report.to_dict(), "duplicates": 0} == report.to_dict()
    assert report.changed == {"unescape_html": 50}


def test_streaming_stops_at_the_first_bad_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*qa(2), {"question": "q", "answer": ""}, *qa(2)])
    rows = stream_examples(source)
    assert [next(rows).answer, next(rows).answer] == ["a0", "a1"]
    with pytest.raises(DataError) as caught:
        next(rows)
    assert f"{source}:3: no answer in column 'answer'" in str(caught.value)


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", qa(2))
    write(tmp_path / "b.jsonl", [gpt("h:a", "g:b")])
    (tmp_path / "c.txt").write_text("Raw text.")
    examples, report = load_examples(str(tmp_path))
    assert [example.kind for example in examples] == ["chat", "chat", "chat", "text"]
    assert list(report.formats.values()) == ["question_answer", "sharegpt", "text"]
    assert report.format == "question_answer, sharegpt, text"


def test_format_and_columns_by_hand(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"title": "t", "body": "b", "text": "x"}])
    examples, report = load_examples(source, columns={"question": "title", "answer": "body"})
    assert [message.content for message in examples[0].messages] == ["t", "b"]
    assert report.format == "question_answer"
    examples, report = load_examples(source, format="text", columns={"text": "body"})
    assert (examples[0].messages[0].content, report.reasons[source]) == ("b", "named by data.format")


def test_a_template_makes_any_columns_readable(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"ticket": "t", "reply": "r", "id": 1}])
    examples, report = load_examples(source, template=PromptTemplate("mine", "Be {ticket}.", "{ticket}?", "{reply}"))
    assert [message.content for message in examples[0].messages] == ["Be t.", "t?", "r"]
    assert report.format == "template"
    assert report.unused_columns == ["id"]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"format": "alpacca"}, ConfigError, "--set data.format=alpaca"),
        ({"format": "alpaca"}, DataError, "are not in the format alpaca (columns instruction, output"),
        ({"columns": {"qestion": "question"}}, ConfigError, "--set data.columns.question=question"),
        ({"columns": {"question": "quest"}}, DataError, "--set data.columns.question=question"),
        ({"cleaning": ["strip_url"]}, ConfigError, "--set data.cleaning=[strip_urls]"),
        ({"num_rows": 0}, ConfigError, "subset of 0 rows"),
        ({"template": PromptTemplate("m", None, "{qestion}", "{answer}")}, DataError, "write {question} in"),
        ({"format": "template"}, ConfigError, "needs a prompt template"),
        ({"format": "messages", "template": PromptTemplate("m", None, "{q}", "{a}")}, ConfigError, "does not apply"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], kind: type[ChulengoError], said: str) -> None:
    source = write(tmp_path / "a.jsonl", qa(2))
    with pytest.raises(kind) as caught:
        load_examples(source, **options)
    assert said in str(caught.value)
    with pytest.raises(kind):
        list(stream_examples(source, **options))


def test_an_unknown_format_names_columns_and_cure(tmp_path: Path) -> None:
    said = refusal(write(tmp_path / "a.jsonl", [{"ticket": "t", "reply": "r"}]))
    assert "columns: ticket, reply" in said
    assert "data.columns.question=ticket" in said


def test_real_folder_of_pairs(shared_data: Path) -> None:
    examples, report = load_examples(str(shared_data / "preference"), cleaning=["drop_unanswered"])
    assert (len(examples), report.rows_read) == (2908, 2912)
    assert sorted(report.formats.values()) == ["kto", "preference", "preference"]
    assert sum(example.kind == "kto" and example.desirable is True for example in examples) == 150


def test_real_tweets_are_cleaned(shared_data: Path) -> None:
    steps = ["unescape_html", "strip_urls", "strip_handles", "collapse_whitespace"]
    examples, report = load_examples(str(shared_data / "tweetsumm" / "with_text"), cleaning=steps)
    assert len(examples) == 1099
    assert all("http" not in message.content for example in examples for message in example.messages)
    assert report.changed["collapse_whitespace"] > 1000

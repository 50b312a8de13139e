"""From data sets to items: ids, conversations, splits, labels, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from chulengo.data.load import load_examples
from chulengo.data.selection import split_by_conversation
from chulengo.errors import ConfigError, DataError
from chulengo.evaluate.task_data import Choice, TaskData, chosen_split, read_task_data
from chulengo.evaluate.tasks import load_task


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def own_task(folder: Path, **keys: object) -> Any:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"metrics": ["exact_match"], **keys}), encoding="utf-8")
    return load_task(str(path))


def squad(path: Path, *, answers: list[str] | None = None) -> str:
    accepted = [{"text": text, "answer_start": 0} for text in answers or ["x"]]
    asked = [{"id": f"q{n}", "question": f"Where {n}?", "answers": accepted} for n in range(3)]
    paragraphs = [{"context": "First.", "qas": asked[:2]}, {"context": "Second.", "qas": asked[2:]}]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")
    return str(path)


def test_squad(tmp_path: Path) -> None:
    source = squad(tmp_path / "dev.json", answers=["x", "y", "x"])
    data = read_task_data(load_task("squad"), source)
    assert [item.id for item in data.items] == ["q0", "q1", "q2"]
    assert [item.group for item in data.items] == ["q0", "q0", "q2"]  # by paragraph
    assert data.items[0].references == ("x", "y")
    assert data.items[0].messages[-1].content.startswith("First.\n\nAnswer with a few words")
    assert data.items[0].messages[-1].content.endswith("Where 0?")
    assert [talk.example.answer for talk in data.talks] == ["x"] * 3


def test_a_folder_of_plain_text_gives_its_test_file_alone(tmp_path: Path) -> None:
    for name in ("test", "train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} text. " * 60, encoding="utf-8")
    task = load_task("text")
    taken = read_task_data(task, str(tmp_path))
    assert (taken.facts["split"], taken.facts["files"]) == ("test", [str(tmp_path / "test.txt")])
    assert len(taken.talks) == 1
    assert chosen_split(task, None)[1].hub == "test"  # of a Hub data set too, not its training text
    assert len(read_task_data(task, str(tmp_path), Choice(split="all")).talks) == 3
    (tmp_path / "test.txt").rename(tmp_path / "last.txt")
    with pytest.raises(DataError, match=r"no file of the split test") as refused:
        read_task_data(task, str(tmp_path))
    assert "--split all (every file)" in str(refused.value)


@pytest.mark.parametrize("name", ["squad", "pubmedqa", "imdb", "summarisation", "medical-qa", "mt-bench", "chat"])
def test_items_without_prompts_are_the_same_items(tmp_path: Path, name: str) -> None:
    sources = {
        "squad": lambda: squad(tmp_path / "dev.json"),
        "pubmedqa": lambda: pubmedqa(tmp_path),
        "imdb": lambda: lines(tmp_path / "r", {"id": "a", "text": "Good.", "label": 1}, {"text": "Bad", "label": 0}),
        "summarisation": lambda: lines(tmp_path / "r", {"dialogue": "a: b", "summary": "c"}),
        "medical-qa": lambda: lines(tmp_path / "r", {"question": "a", "answer": "b", "focus": "f"},
                                    {"question": "c", "answer": "d", "focus": "f"}),
        "mt-bench": lambda: lines(tmp_path / "r", {"question_id": 81, "turns": ["a", "b"]}),
        "chat": lambda: lines(tmp_path / "r", {"text": "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"}),
    }
    made = sources[name]()
    if made.endswith("/r"):
        made = str(Path(made).rename(tmp_path / "rows.jsonl"))
    whole, lean = (read_task_data(load_task(name), made, prompts=prompts) for prompts in (True, False))
    def core(data: TaskData) -> list[Any]:
        return [(i.id, i.group, i.references) for i in data.items]

    assert core(whole) == core(lean)
    assert whole.facts == lean.facts
    assert all(item.messages for item in whole.items)
    assert lean.talks == ()


def pubmedqa(folder: Path) -> str:
    folder.joinpath("ori_pqal.json").write_text(json.dumps({
        key: {"QUESTION": f"Does {key}?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "Perhaps.",
              "final_decision": answer}
        for key, answer in [("11", "yes"), ("12", "no"), ("13", "maybe")]
    }), encoding="utf-8")
    folder.joinpath("test_ground_truth.json").write_text('{"13": "no", "11": "yes"}', encoding="utf-8")
    return str(folder)


def test_pubmedqa_splits(tmp_path: Path) -> None:
    source, task = pubmedqa(tmp_path), load_task("pubmedqa")
    test = read_task_data(task, source)
    assert [(i.id, i.references) for i in test.items] == [("11", ("yes",)), ("13", ("no",))]  # the file's label wins
    assert test.items[0].messages[-1].content.startswith("One.\n\nTwo.\n\nQuestion: Does 11?")
    assert test.talks[1].example.answer == "no"
    train = read_task_data(task, source, Choice(split="train"))
    assert [i.id for i in train.items] == ["12"]
    assert len(read_task_data(task, source, Choice(split="all")).items) == 3
    assert [i.id for i in read_task_data(task, f"{source}/ori_pqal.json").items] == ["11", "13"]
    with pytest.raises(ConfigError, match=r"no split 'tset'(.|\n)*--split test"):
        read_task_data(task, source, Choice(split="tset"))
    tmp_path.joinpath("test_ground_truth.json").write_text('{"13": "no", "99": "yes"}', encoding="utf-8")
    with pytest.raises(DataError, match="1 of 2 ids of the split are not in"):
        read_task_data(task, source)
    tmp_path.joinpath("test_ground_truth.json").unlink()
    with pytest.raises(DataError, match="needs the file test_ground_truth"):
        read_task_data(task, source)


def test_gold_labels_get_the_task_s_names(tmp_path: Path) -> None:
    source = lines(tmp_path / "r.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": "neg"})
    data = read_task_data(load_task("imdb"), source)
    assert [i.references for i in data.items] == [("positive",), ("negative",)]
    assert [talk.example.answer for talk in data.talks] == ["positive", "negative"]


def test_every_answer_or_the_last(tmp_path: Path) -> None:
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": text} for role, text in zip(roles, "abcd", strict=True)]
    source = lines(tmp_path / "r.jsonl", {"messages": turns})
    last = read_task_data(load_task("chat"), source).items
    assert [(i.id, i.references, len(i.messages)) for i in last] == [("1", ("d",), 3)]
    assert last[0].question == "user: a\n\nassistant: b\n\nuser: c"
    each = read_task_data(own_task(tmp_path, turns="each"), source).items
    assert [(i.id, i.group, i.references, len(i.messages)) for i in each] == [
        ("1/1", "1", ("b",), 1), ("1/2", "1", ("d",), 3)
    ]


def test_questions_in_two_turns(tmp_path: Path) -> None:
    source = lines(tmp_path / "question.jsonl", {"question_id": 81, "turns": ["a", "b"]})
    items = read_task_data(load_task("mt-bench"), source).items
    assert [(i.id, i.group, i.question, i.asked_before) for i in items] == [
        ("81/1", "81", "a", 0), ("81/2", "81", "a\n\nb", 1)
    ]
    with pytest.raises(DataError, match="no list of questions in the column 'turns'"):
        read_task_data(load_task("mt-bench"), lines(tmp_path / "other.jsonl", {"question_id": 1, "turn": "a"}))


def test_passages_of_a_text(tmp_path: Path) -> None:
    text = " ".join(f"w{n}" for n in range(50)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    task = own_task(tmp_path, kind="text", format="text", prompt_words=4, answer_words=3, num_prompts=5)
    items = read_task_data(task, str(tmp_path / "a.txt")).items
    assert len(items) == 5
    assert items[0].question == items[0].messages[0].content == "w0 w1 w2 w3"
    assert items[0].references == ("w4 w5 w6",)
    assert items[1].question.startswith("w7 ")
    assert items[0].messages[0].role == "text"
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(DataError, match="7 words"):
        read_task_data(task, str(tmp_path / "a.txt"))


def test_a_subset_keeps_the_ids_of_the_whole(tmp_path: Path) -> None:
    source = lines(tmp_path / "r.jsonl", *({"question": f"{n}", "answer": f"a{n}"} for n in range(20)))
    some = read_task_data(load_task("medical-qa"), source, Choice(num_rows=5, seed=3)).items
    assert len(some) == 5
    assert all(item.references == (f"a{int(item.id) - 1}",) for item in some)


def test_held_out_rows_are_those_that_training_holds_out(tmp_path: Path) -> None:
    source = lines(tmp_path / "r.jsonl", *({"question": f"q{n}", "answer": f"a{n}"} for n in range(40)))
    held = split_by_conversation(load_examples(source)[0], 0.1, 0)[1]
    data = read_task_data(load_task("medical-qa"), source, Choice(split="held_out"))
    assert [talk.example for talk in data.talks] == held


def test_cleaning_and_columns(tmp_path: Path) -> None:
    rows = [{"frage": "see https://x.y now", "antwort": "a"}, {"frage": "b", "antwort": ""}]
    source = lines(tmp_path / "r.jsonl", *rows)
    columns = {"question": "frage", "answer": "antwort"}
    with pytest.raises(DataError, match="1 of 2 items have no accepted answer: 2"):
        read_task_data(load_task("medical-qa"), source, Choice(columns=columns))
    choice = Choice(columns=columns, cleaning=("strip_urls", "drop_unanswered"))
    items = read_task_data(load_task("medical-qa"), source, choice, prompts=False).items
    assert [(i.id, "https" in i.question) for i in items] == [("1", False)]


def test_what_cannot_be_used(tmp_path: Path) -> None:
    task = load_task("medical-qa")
    twice = lines(tmp_path / "twice.jsonl", *({"id": "a", "question": "q", "answer": "b"} for _ in range(2)))
    with pytest.raises(DataError, match=r"twice.jsonl:2 and .*twice.jsonl:1 have the same id 'a'"):
        read_task_data(task, twice)
    with pytest.raises(DataError, match="3 of 3 items have no accepted answer: q0, q1, q2"):
        read_task_data(load_task("squad"), squad(tmp_path / "v2.json", answers=[" "]))
    with pytest.raises(DataError, match="The task squad reads the format squad"):
        read_task_data(own_task(tmp_path, name="squad", format="squad"), twice)
    with pytest.raises(DataError, match="no file of the split validation"):
        read_task_data(load_task("squad"), str(tmp_path))
    rows = [{"question": "q", "answer": "b"} for _ in range(25)]
    rows[22]["answer"] = {"no": "text"}  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"1 of 25 rows cannot be read:\n.*r.jsonl:23"):
        read_task_data(task, lines(tmp_path / "r.jsonl", *rows))

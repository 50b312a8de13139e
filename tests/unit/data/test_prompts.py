"""Prompt templates: substitution and nothing more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chulengo.data.prompts import PromptTemplate, fill, load_template, named_values, template_columns
from chulengo.errors import ConfigError, DataError

GOOD = 'name: ticket\nsystem: "You help {company}."\nuser: |-\n  {question}\n\n  {context}\nanswer: "{answer}"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "template.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_template_is_read_from_yaml(tmp_path: Path) -> None:
    template = load_template(write(tmp_path, GOOD))
    assert template == PromptTemplate("ticket", "You help {company}.", "{question}\n\n{context}", "{answer}")
    assert template.columns == ("company", "question", "context", "answer")
    short = load_template(write(tmp_path, 'user: "{q}"\nanswer: "{a}"'))
    assert short == PromptTemplate("template", None, "{q}", "{a}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('user: "{q}"\nanswr: "{a}"', "unknown key 'answr' (did you mean 'answer'?); 'answer' is missing"),
        ('user: [1]\nanswer: "{a}"', "'user' must be text"),
        ('user: "{q}"\nanswer: always the same', "names no column"),
        ('user: "{q"\nanswer: "{a}"', "stray '{' at character 1"),
        ('user: "q}"\nanswer: "{a}"', "stray '}' at character 2"),
        ('user: "{}"\nanswer: "{a}"', "stray '{}'"),
        ("- a\n- b", "not a mapping"),
        ('user: "{q}"\nanswer: "{a}"\nlabels: [x]', "'labels' must be a mapping such as"),
        ('user: "{q}"\nanswer: "{a}"\nlabels: {a: x}', "'labels' must be a mapping such as"),
        ('user: "{q}"\nanswer: "{a}"\nlabels: {a: {0: no}}', "the name of a 0 must be text (in quotes?), not False"),
        ("user: [", "not valid YAML"),
    ],
)
def test_a_faulty_template_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_template(write(tmp_path, text))
    assert said in str(caught.value)


def test_a_missing_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_template(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{a} and {b}", "1 and two"),
        ("{{a}} {a} {{{a}}}", "{a} 1 {1}"),
        ("no columns {{}}", "no columns {}"),
        ("{two words}", "2"),
        ("{list}", "x\ny"),
        ("{yes} {half} {whole}", "true 0.5 3"),
        ("{a}\n\n{empty}", "1"),
        ("{empty}\n\n{a}", "1"),
        ("{a}\n\nContext: {empty}\n\n{b}", "1\n\ntwo"),
        ("{a}\n\nContext: {empty} {b}", "1\n\nContext:  two"),
        ("Literal stays.\n\n{empty}", "Literal stays."),
        ("{none}{nan}{empty}", ""),
        ("{a}\n \n\n{b}", "1\n \n\ntwo"),
    ],
)
def test_filling(text: str, filled: str) -> None:
    fields = {
        "a": 1, "b": "two", "two words": 2, "list": ["x", "y"], "yes": True, "half": 0.5, "whole": 3.0,
        "empty": "", "none": None, "nan": float("nan"),
    }  # fmt: skip
    assert fill(text, fields) == filled


def test_values_are_never_read_as_templates() -> None:
    draw = random.Random(0)
    for _ in range(500):
        value = "".join(draw.choice("{}ab\n\\ $%") for _ in range(12)) + "x"
        assert fill("<{a}|{b}>", {"a": value, "b": value}) == f"<{value}|{value}>"


@pytest.mark.parametrize("text", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}", "{0}"])
def test_format_syntax_is_no_way_into_objects(text: str) -> None:
    with pytest.raises(DataError, match="which the data do not have"):
        fill(text, {"a": "x"})


def test_an_unknown_column_names_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        fill("{qestion}", {"question": "?", "answer": "!"})
    assert "'qestion'" in str(caught.value)
    assert "write {question} in the template" in str(caught.value)


def test_values_get_the_names_that_the_template_gives_them(tmp_path: Path) -> None:
    text = 'user: "{q}"\nanswer: "{a}"\nlabels:\n  a: {0: negative, 1: positive, none: nothing}\n'
    template = load_template(write(tmp_path, text))
    for value, name in ((0, "negative"), ("1", "positive"), (1.0, "positive"), ("none", "nothing")):
        assert named_values(template, {"q": "", "a": value}) == {"a": name}
    assert named_values(template, {"q": "", "a": None}) == {"a": ""}, "an empty cell is a missing answer, as ever"
    with pytest.raises(DataError, match="holds '2'") as caught:
        named_values(template, {"q": "", "a": 2})
    assert caught.value.allowed == "0, 1, none"
    with pytest.raises(DataError, match="which the data do not have"):
        named_values(template, {"q": ""})


def test_an_object_is_no_text() -> None:
    with pytest.raises(DataError, match="column 'a' holds dict, not text"):
        fill("{a}", {"a": {"b": 1}})


def test_columns_of_a_text() -> None:
    assert template_columns("{{x}} {a} {b c} {a}") == ["a", "b c", "a"]

"""Tasks as files: the built-in ones, one's own, and every mistake in one of them named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from chulengo.errors import ConfigError
from chulengo.evaluate.tasks import builtin_tasks, load_task

NAMES = {"chat", "summarisation", "medical-qa", "pubmedqa", "squad", "imdb", "text", "mt-bench"}


def write(folder: Path, **keys: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"metrics": ["exact_match"], **keys}), encoding="utf-8")
    return str(path)


def test_the_built_in_tasks() -> None:
    assert set(builtin_tasks()) == NAMES
    for name in NAMES:
        task = load_task(name)
        assert task.name == name
        assert task.description
        assert (task.headline is None) == (name == "mt-bench")
    assert load_task("pubmedqa").labels == ("yes", "no", "maybe")
    assert load_task("text").loss_metrics == ("perplexity", "bits_per_byte", "next_token_accuracy")


def test_one_s_own(tmp_path: Path) -> None:
    labels = {"good": ["fine", 1], "bad": []}
    task = load_task(write(
        tmp_path, prompt={"user": "{q}", "answer": "{a}"}, read={"rule": "label", "labels": labels}, group="talk",
        metrics=["accuracy", "f1:good"], headline="accuracy", splits={"test": {"files": "t*.csv"}, "all": None},
        split="test", gold={0: "bad"}, max_new_tokens=4,
    ))
    assert task.name == "mine"
    assert task.read.labels == {"good": ("fine", "1"), "bad": ()}
    assert task.prompt is not None
    assert (task.prompt.user, task.prompt.answer, task.group) == ("{q}", "{a}", ("talk",))
    assert task.splits["test"].files == ("t*.csv",)
    assert (task.gold, task.max_new_tokens) == ({"0": "bad"}, 4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"metric": ["bleu"]}, "unknown key 'metric' (did you mean 'metrics'?)"),
        ({"metrics": ["rougeLl"]}, "unknown metric 'rougeLl' (did you mean 'rougeL'?)"),
        ({"metrics": ["zzzz"]}, "unknown metric 'zzzz', allowed: bleu"),
        ({"metrics": ["bleu", "bleu"]}, "named twice"),
        ({"metrics": []}, "metrics is missing"),
        ({"metrics": ["bits_per_byte"]}, "for tasks of kind text"),
        ({"metrics": ["f1:maybe"], "read": {"rule": "label", "labels": ["yes", "no"]}}, "unknown metric 'f1:maybe'"),
        ({"headline": "bleu"}, "headline is 'bleu'"),
        ({"read": "first_lin"}, "did you mean first_line?"),
        ({"read": {"rul": "text"}}, "unknown key 'read.rul' (did you mean 'read.rule'?)"),
        ({"read": {"rule": "label", "labels": {True: [], False: []}}}, "put yes and no in quotes"),
        ({"read": {"rule": "label", "labels": ["one"]}}, "two labels or more"),
        ({"read": "json"}, "read.field"),
        ({"prompt": {"user": "{q"}}, "prompt.answer is missing"),
        ({"prompt": {"user": "{q", "answer": "{a}"}}, "stray '{'"),
        ({"prompt": "text"}, "prompt must be a mapping"),
        ({"splits": {"test": {"file": "x"}}}, "did you mean 'splits.test.files'?"),
        ({"splits": {"test": {"held_out": 2}}}, "held_out is 2"),
        ({"split": "tset", "splits": {"test": {}}}, "split is 'tset'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"kind": "chats"}, "kind is 'chats', allowed: chat, text"),
        ({"window": 8, "stride": 9}, "tokens would be left out"),
        ({"gold": {"1": "x"}}, "gold.1 is 'x'"),
        ({"user_turns": "turns", "metrics": ["perplexity"]}, "no answers"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, keys: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(write(tmp_path, **keys))
    assert says in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(write(tmp_path, naem="x", max_new_tokens=-1, read="firstline"))
    assert str(caught.value).count("\n  - ") == 3


def test_no_such_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task 'sqad'(.|\n)*--task squad"):
        load_task("sqad")
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read(.|\n)*mine\.yaml"):
        load_task(str(tmp_path / "mine2.yaml"))
    Path(path).write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML: line 1"):
        load_task(path)
    Path(path).write_text("- a", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_task(path)


def problems(folder: Path, **keys: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_task(write(folder, **keys))
    return [line.strip() for line in str(caught.value).splitlines() if line.startswith("  - ")]


def test_a_word_stands_for_one_label(tmp_path: Path) -> None:
    for labels, word in (({"bad": ["fine"], "good": ["Fine"]}, "Fine"), ({"bad": [], "good": ["BAD"]}, "BAD")):
        said = problems(tmp_path, read={"rule": "label", "labels": labels}, metrics=["accuracy"])
        assert said == [f"- read.labels: '{word}' stands for two labels, 'bad' and 'good'"]
    labels = {"bad": ["Bad", "poor"], "good": []}
    path = write(tmp_path, read={"rule": "label", "labels": labels}, metrics=["accuracy"])
    assert load_task(path).labels == ("bad", "good")


def test_a_key_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, key, line in (("metrics: [bleu]\nturns: last\nmetrics: [ter]\n", "metrics", 3),
                            ("metrics: [accuracy]\nread:\n  labels: {a: [x], b: [], a: [y]}\n", "a", 3)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"YAML: line {line}, column \d+: the key '{key}' stands twice"):
            load_task(str(path))
    path.write_text("metrics: [bleu]\nread: &r {rule: text}\nsplits: {a: {}, b: {}}\n", encoding="utf-8")
    assert set(load_task(str(path)).splits) == {"a", "b"}


def test_a_misspelt_metric_is_one_mistake(tmp_path: Path) -> None:
    labels = {"rule": "label", "labels": ["good", "bad"]}
    assert problems(tmp_path, read=labels, metrics=["acuracy"], headline="accuracy") == [
        "- unknown metric 'acuracy' (did you mean 'accuracy'?)"]
    assert len(problems(tmp_path, metrics=["bleau"], headline="ter")) == 2
    assert problems(tmp_path, read=labels, metrics=["f1:bda"], headline=None) == [
        "- unknown metric 'f1:bda': there is no label 'bda', only good, bad"]
    assert problems(tmp_path, metrics=["f1:bad"]) == ["- unknown metric 'f1:bad': read.labels names no labels"]

"""The search space: what is read from words and files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from chulengo.errors import ConfigError
from chulengo.evaluate.search.space import Dimension, default_specs, dimension, read_space, short

KINDS = {
    "training.learning_rate": "float", "training.epochs": "float", "training.schedule": "other",
    "training.weight_decay": "float", "lora.rank": "int", "lora.alpha": "float", "lora.dropout": "float",
    "lora.rslora": "other", "data.num_rows": "int",
}  # fmt: skip
SETTINGS = {
    "training.learning_rate": 2e-4, "training.epochs": 1.0, "training.schedule": "polynomial", "lora.rank": 12,
    "lora.alpha": 32.0, "lora.dropout": 0.0, "data.num_rows": None,
}  # fmt: skip
DEFAULTS = default_specs(SETTINGS, 1000)


@pytest.mark.parametrize(
    ("key", "spec", "kind", "expected"),
    [
        ("a.b", "1e-5..1e-3:log", "float", Dimension("a.b", low=1e-5, high=1e-3, log=True)),
        ("a.b", " 0.5 .. 2 ", "float", Dimension("a.b", low=0.5, high=2.0)),
        ("a.b", "-1..1", "float", Dimension("a.b", low=-1.0, high=1.0)),
        ("a.b", "4..64 : log", "int", Dimension("a.b", low=4, high=64, integer=True, log=True)),
        ("a.b", "1e3,2000", "int", Dimension("a.b", choices=(1000, 2000))),
        ("a.b", "0,5e-2", "float", Dimension("a.b", choices=(0.0, 0.05))),
        ("a.b", "true,false", "other", Dimension("a.b", choices=(True, False))),
        ("a.b", "linear, cosine", "other", Dimension("a.b", choices=("linear", "cosine"))),
        ("a.b", [8, 16], "int", Dimension("a.b", choices=(8, 16))),
        ("a.b", {"low": "1e-5", "high": 1, "log": True}, "float", Dimension("a.b", low=1e-5, high=1.0, log=True)),
    ],
)
def test_one_dimension(key: str, spec: object, kind: str, expected: Dimension) -> None:
    assert dimension(key, spec, kind) == expected


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("3..1", "int", "does not rise"),
        ("1..1", "float", "does not rise"),
        ("nan..1", "float", "does not rise"),
        ("1..inf", "float", "does not rise"),
        ("0..1:log", "float", "no logarithm"),
        ("1.5..4", "int", "'1.5' is no whole number"),
        ("many..4", "float", "'many' is no number"),
        ("8", "int", "only one value"),
        ("8,8", "int", "twice the same value"),
        ("8,16,8", "int", "twice the same value"),
        ("1..2", "other", "has no range"),
        ({"low": 1}, "int", "no low or no high"),
        ({"low": 1, "high": 2, "step": 1}, "int", "unknown step"),
        ([[1], [2]], "other", "no single value"),
        ("", "int", "'' is no whole number"),
    ],
)
def test_what_is_no_dimension(spec: object, kind: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dimension("a.b", spec, kind)


def test_text_can_be_typed_again() -> None:
    specs = {"1e-05..0.0033333333333:log": "float", "4..64": "int", "a,b": "other", "0.1,1e-07": "float"}
    for spec, kind in specs.items():
        found = dimension("a.b", spec, kind)
        assert dimension("a.b", found.text(), kind) == found


def test_holds() -> None:
    numbers, choices = dimension("a.b", "4..64", "int"), dimension("a.b", "linear,cosine", "other")
    assert [numbers.holds(value) for value in (4, 64, 65, 3, 4.5, None, "8", True)] == [True, True, *[False] * 6]
    assert (choices.holds("cosine"), choices.holds("constant")) == (True, False)


def test_the_default_space_is_centred_on_the_configuration() -> None:
    found = {d.key: d for d in read_space([], KINDS, DEFAULTS)}
    assert list(found) == ["training.learning_rate", "lora.rank", "lora.alpha", "lora.dropout", "training.schedule",
                           "training.epochs"]  # fmt: skip
    assert found["training.learning_rate"] == Dimension("training.learning_rate", low=2e-5, high=2e-3, log=True)
    assert found["lora.rank"].choices == (4, 8, 12, 16, 32, 64)
    assert found["training.epochs"].choices == (0.5, 1.0, 2.0)
    assert all(d.holds(SETTINGS[d.key]) for d in found.values()), "trial 0 is the configuration"


def test_words(tmp_path: Path) -> None:
    rows = read_space(["rows"], KINDS, DEFAULTS)
    assert rows == [Dimension("data.num_rows", low=125, high=1000, integer=True, log=True)]
    some = read_space(["learning_rate,rank", "rank=2,4", "training.weight_decay=0..0.1"],
                      KINDS, DEFAULTS)  # fmt: skip
    assert [(d.key, d.choices) for d in some] == [
        ("training.learning_rate", ()), ("lora.rank", (2, 4)), ("training.weight_decay", ()),
    ]  # fmt: skip
    assert len(read_space(["default", "rank=2,4"], KINDS, DEFAULTS)) == 6
    file = tmp_path / "space.yaml"
    file.write_text("learning_rate: 1e-5..1e-3:log\nlora.rank: [8, 16]\nalpha:\nepochs: {low: 1, high: 3}\n")
    assert [d.text() for d in read_space([str(file)], KINDS, DEFAULTS)] == [
        "1e-05..0.001:log", "8,16", "8.0,16.0,32.0,64.0", "1.0..3.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("learning_rte=1..2", "--space learning_rate="),
        ("lora.rnk=1,2", "--space lora.rank="),
        ("training.seed=1,2", "no setting that can be searched"),
        ("training.weight_decay", "has no default range"),
        ("nowhere.yaml", "cannot be read"),
    ],
)
def test_words_that_are_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_space([word], KINDS, DEFAULTS)


@pytest.mark.parametrize(
    ("text", "said"), [("- a\n", "holds no settings"), ("a: [", "not valid YAML"), ("", "holds no settings")]
)
def test_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "space.yml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_space([str(tmp_path / "space.yml")], KINDS, DEFAULTS)


def test_short_names() -> None:
    assert [short(key) for key in ("data.num_rows", "lora.rank", "training.weight_decay")] == [
        "rows", "rank", "weight_decay",
    ]  # fmt: skip

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chulengo.errors import ChulengoError, ConfigError, DataError
from chulengo.evaluate.simulate.scenarios import load_scenarios, with_defaults

GOOD = """
client_stop: goodbye
system: Help.
scenarios:
  - id: one
    persona: A hiker.
    goal: Find the price.
    opening: Hello!
    met_when: {text: "165"}
  - opening: ["What?", "Why?"]
    client_stop: enough
    system: Be kind.
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "s.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_of_scenarios(tmp_path: Path) -> None:
    one, two = load_scenarios(written(tmp_path, GOOD))
    assert (one.id, one.persona, one.goal, one.script) == ("one", "A hiker.", "Find the price.", ("Hello!",))
    assert (one.played, one.client_stop, one.system, one.has_goal) == (True, "goodbye", "Help.", True)
    assert (two.id, two.script, two.played) == ("2", ("What?", "Why?"), False)
    assert (two.client_stop, two.system) == ("enough", "Be kind.")
    assert one.met_when is not None
    assert two.met_when is None


def test_a_bare_list_is_a_file_too(tmp_path: Path) -> None:
    assert [each.id for each in load_scenarios(written(tmp_path, "- {id: 7, goal: x}\n"))] == ["7"]


def test_the_agents_system_prompt_fills_what_is_open(tmp_path: Path) -> None:
    found = load_scenarios(written(tmp_path, "- {goal: x}\n- {goal: y, system: own}\n"))
    assert [each.system for each in with_defaults(found, system="s")] == ["s", "own"]


def test_the_fingerprint_sees_everything_but_the_source(tmp_path: Path) -> None:
    one = load_scenarios(written(tmp_path, GOOD))[0]
    assert replace(one, source="elsewhere").fingerprint() == one.fingerprint()
    changed = [replace(one, **{name: "other"}) for name in ("id", "persona", "goal", "system", "client_stop")]
    changed += [replace(one, script=("a",)), replace(one, met_when=None), replace(one, real_answers=("a",))]
    assert len({each.fingerprint() for each in [one, *changed]}) == len(changed) + 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no list of scenarios"),
        ("scenarios: []", "no list of scenarios"),
        ("scenarios: {a: 1}", "no list of scenarios"),
        ("scenarios: [", "not valid YAML"),
        ("scenario: [{goal: x}]", "no list of scenarios"),
        ("[{goal: x}, 5]", "scenario 2 is int"),
        ("[{gaol: x}]", "unknown key 'gaol'"),
        ("{scenarios: [{goal: x}], sytem: y}", "unknown key 'sytem'"),
        ("[{id: a}]", "says nothing of the client"),
        ("[{goal: ''}]", "goal is ''"),
        ("[{goal: 5}]", "goal is 5"),
        ("[{opening: [a, '']}]", "opening is ''"),
        ("[{id: [1], goal: x}]", "its id is [1]"),
        ("[{id: a, goal: x}, {id: a, goal: y}]", "the id 'a'"),
        ("[{goal: x, met_when: {fakts: [a]}}]", "no kind 'fakts'"),
        ("{client_prompt: 'You are {who}', scenarios: [{goal: x}]}", "client_prompt names {who}"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ChulengoError) as error:
        load_scenarios(written(tmp_path, text))
    assert says in str(error.value)
    assert "try:" in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"s\.yaml"):
        load_scenarios(tmp_path / "t.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_scenarios(tmp_path / "b.yaml")

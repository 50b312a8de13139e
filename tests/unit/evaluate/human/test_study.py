"""Who rates what: overlap, sides, repeats, order, and the key."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import ConfigError, DataError
from chulengo.evaluate.human.study import Entry, Item, Study, make_study, read_key, write_key
from rating_kit import items

SYSTEMS = ("tuned", "base")
RATERS = ("anna", "ben", "carla")


def first_showings(study: Study) -> list[Entry]:
    return [entry for entry in study.entries if entry.showing == 1]


def raters_of_items(study: Study) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for entry in first_showings(study):
        found[entry.item].append(entry.rater)
    return found


@pytest.mark.parametrize(("count", "overlap", "shared"), [(100, 0.2, 20), (15, 0.2, 3), (10, 0.15, 2), (7, 0, 0),
                                                          (7, 1, 7)])
def test_overlap_is_the_share_that_everybody_rates(count: int, overlap: float, shared: int) -> None:
    study = make_study(items(count), SYSTEMS, RATERS, overlap=overlap)
    found = raters_of_items(study)
    assert len(found) == count
    num_raters = Counter(len(raters) for raters in found.values())
    assert (num_raters[3], num_raters[1]) == (shared, count - shared)
    assert all(len(set(raters)) == len(raters) for raters in found.values())
    loads = Counter(entry.rater for entry in first_showings(study))
    assert max(loads.values()) - min(loads.values()) <= 1


def test_repeats_come_late_and_swapped() -> None:
    study = make_study(items(60), SYSTEMS, RATERS, repeats=0.2)
    for rater in RATERS:
        own = [entry for entry in study.entries if entry.rater == rater]
        place = {(entry.item, entry.showing): number for number, entry in enumerate(own)}
        again = [entry for entry in own if entry.showing == 2]
        num_first = len(own) - len(again)
        assert len(again) == math.ceil(0.2 * num_first)
        for entry in again:
            first = own[place[entry.item, 1]]
            assert (entry.left, entry.right) == (first.right, first.left)
            assert place[entry.item, 2] - place[entry.item, 1] >= num_first / 3
        assert any(entry.showing == 1 for entry in own[own.index(again[0]) :]), "repeats are not all at the end"


def test_sides_are_fair_coins_of_every_rater() -> None:
    study = make_study(items(2000), SYSTEMS, ("anna", "ben"), overlap=1, repeats=0)
    sides = {(entry.rater, entry.item): entry.left == "tuned" for entry in study.entries}
    # 5 standard deviations of 4000 and of 2000 fair coins
    assert abs(sum(sides.values()) - 2000) < 5 * math.sqrt(4000) / 2
    agree = sum(sides["anna", f"q{n}"] == sides["ben", f"q{n}"] for n in range(2000))
    assert abs(agree - 1000) < 5 * math.sqrt(2000) / 2


def test_the_same_seed_gives_the_same_study() -> None:
    def made(**more: Any) -> Study:
        return make_study(items(30), SYSTEMS, RATERS, **more)

    assert made() == made()
    assert made(seed=1).entries != made().entries
    assert [entry.item for entry in made().entries if entry.rater == "anna"] != [f"q{n}" for n in range(30)]
    assert len({entry.id for entry in made().entries}) == len(made().entries)


def test_a_part_of_the_items() -> None:
    study = make_study(items(50), SYSTEMS, RATERS, num_items=12)
    assert len(raters_of_items(study)) == 12
    assert len(study.items) == 50


def test_equal_answers_are_not_shown() -> None:
    mixed = [*items(5), Item("same", "?", {"tuned": "x", "base": "x"})]
    study = make_study(mixed, SYSTEMS, RATERS)
    assert study.num_equal_pairs == 1
    assert "same" not in raters_of_items(study)
    with pytest.raises(DataError, match="all 1 pairs of answers are letter for letter equal"):
        make_study(mixed[-1:], SYSTEMS, RATERS)


def test_three_systems_meet_each_other() -> None:
    names = ("a", "b", "c")
    study = make_study(items(10, names), names, ("anna",))
    pairs = Counter(frozenset((entry.left, entry.right)) for entry in first_showings(study))
    assert pairs == {frozenset("ab"): 10, frozenset("ac"): 10, frozenset("bc"): 10}


def test_one_system_is_rated_alone_by_criteria() -> None:
    study = make_study(items(9, ("a",)), ("a",), ("anna",), criteria=("helpful",), repeats=0.3)
    assert {(entry.left, entry.right) for entry in study.entries} == {("a", "")}
    assert sum(entry.showing == 2 for entry in study.entries) == 3
    with pytest.raises(ConfigError, match="nothing to be compared with"):
        make_study(items(9, ("a",)), ("a",), ("anna",))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"overlap": 1.1}, "overlap is 1.1"), ({"overlap": -0.1}, "overlap"), ({"repeats": 0.5}, "repeats is 0.5"),
        ({"num_items": 0}, "number of items is 0"), ({"raters": ()}, "nobody"), ({"raters": ("a", "A")}, "a, A"),
        ({"raters": ("../x",)}, "cannot be named after"), ({"criteria": ("choice",)}, "named 'choice'"),
        ({"criteria": ("=x",)}, "named '=x'"), ({"criteria": ("x", "X")}, "named twice"),
        ({"systems": ("tuned", "tuned")}, "Two systems have one name"),
    ],
)
def test_settings_that_are_not_allowed(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_study(**{"items": items(5), "systems": SYSTEMS, "raters": RATERS, **more})


def test_the_key_comes_back(tmp_path: Path) -> None:
    study = make_study(items(20), SYSTEMS, RATERS, criteria=("helpful",), seed=4)
    file = tmp_path / "key.json"
    write_key(file, study)
    assert read_key(file) == study
    assert file.stat().st_mode & 0o077 == 0


def test_a_key_of_other_answers_is_refused(tmp_path: Path) -> None:
    study = make_study(items(3), SYSTEMS, RATERS)
    file = tmp_path / "key.json"
    changed = replace(study, items=(replace(study.items[0], question="Another?"), *study.items[1:]))
    write_key(file, changed)
    with pytest.raises(DataError, match="not the ones that were handed out"):
        read_key(file)


@pytest.mark.parametrize(("text", "says"), [("x", "cannot be read"), ("{}", "not a key"), ("[]", "not a key"),
                                            (json.dumps({"format": "chulengo-rating-key/1"}), "broken key")])
def test_a_file_that_is_no_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(DataError, match=says):
        read_key(tmp_path / "key.json")

"""Subsets, splits, duplicates, and writing rows out."""

from __future__ import annotations

import errno
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chulengo.data.load import load_examples
from chulengo.data.selection import duplicates, sample, split_by_conversation, write_examples
from chulengo.data.types import Example, Kind, Message, Role
from chulengo.errors import ConfigError, DataError


def row(question: str, answer: str = "a", number: int = 0, **more: object) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), f"x:{number}", **more)  # type: ignore[arg-type]


def rows(count: int) -> list[Example]:
    return [row(f"question {i}", number=i) for i in range(count)]


# ---- subsets


def test_a_subset_keeps_order_repeats_and_grows() -> None:
    many = rows(1000)
    small, large = sample(iter(many), 50, seed=3), sample(many, 200, seed=3)
    assert len(small) == 50
    assert small == sorted(small, key=many.index)
    assert small == sample(many, 50, seed=3)
    assert set(small) <= set(large)
    assert small != sample(many, 50, seed=4)
    assert sample(many, 5000, seed=3) == many


def test_every_row_is_drawn_equally_often() -> None:
    many = rows(20)
    counts = Counter(example.source for seed in range(2000) for example in sample(many, 5, seed))
    # 500 expected, standard deviation sqrt(2000 * 0.25 * 0.75) = 19.4; five of them
    assert len(counts) == 20
    assert all(abs(count - 500) < 97 for count in counts.values())


def test_a_subset_needs_memory_for_itself_only() -> None:
    alive = Counter[str]()

    class Watched(str):
        __slots__ = ()

        def __del__(self) -> None:
            alive["now"] -= 1

    peak = 0

    def many() -> Iterator[Example]:
        nonlocal peak
        for i in range(2000):
            alive["now"] += 1
            yield Example((), Watched(f"x:{i}"))
            peak = max(peak, alive["now"])

    assert len(sample(many(), 10, seed=0)) == 10
    assert peak < 20


def test_a_subset_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="subset of 0 rows"):
        sample(rows(3), 0, seed=0)


# ---- splits


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 3, 10, 99, 1000])
def test_a_split_respects_the_fraction(count: int, fraction: float) -> None:
    many = rows(count)
    train, validation = split_by_conversation(many, fraction, seed=1)
    assert len(validation) == min(max(1, round(fraction * count)), count - 1)
    assert sorted(train + validation, key=many.index) == many
    assert train == sorted(train, key=many.index)
    assert validation == sorted(validation, key=many.index)


def test_rows_with_the_same_opening_stay_together() -> None:
    draw = random.Random(0)
    many = [
        row(draw.choice([f"Question {i % 60}?", f" question\n{i % 60}? ", f"QUESTION  {i % 60}?"]), f"answer {i}", i)
        for i in range(300)
    ]
    for seed in range(20):
        train, validation = split_by_conversation(many, 0.2, seed)
        sides = [{" ".join(e.messages[0].content.lower().split()) for e in side} for side in (train, validation)]
        assert not sides[0] & sides[1]
        assert len(validation) == 60


def test_rows_of_a_group_stay_together() -> None:
    many = [row(f"question {i}", number=i, group=f"passage {i // 5}") for i in range(200)]
    for seed in range(20):
        train, validation = split_by_conversation(many, 0.1, seed)
        assert len(validation) == 20
        assert not {e.group for e in train} & {e.group for e in validation}
    one = [replace(example, group="the same for all") for example in many]
    assert len(split_by_conversation(one, 0.1, 0)[1]) == 20, "a passage that goes with every question parts nothing"


def test_a_split_depends_on_seed_and_text_not_on_order() -> None:
    many = rows(200)
    _, validation = split_by_conversation(many, 0.1, seed=0)
    assert split_by_conversation(many, 0.1, seed=0)[1] == validation
    assert split_by_conversation(many, 0.1, seed=1)[1] != validation
    assert set(split_by_conversation(many[::-1], 0.1, seed=0)[1]) == set(validation)


def test_splits_at_the_edges() -> None:
    assert split_by_conversation(rows(5), 0, seed=0) == (rows(5), [])
    assert split_by_conversation(rows(1), 0.5, seed=0) == (rows(1), [])
    same = [row("Hello", f"answer {i}") for i in range(10)]
    assert split_by_conversation(same, 0.5, seed=0) == (same, [])
    # one opening shared by 90 of 100 rows: the validation rows come from the others
    mixed = [row("Hello", f"a {i}") for i in range(90)] + rows(10)
    _, validation = split_by_conversation(mixed, 0.05, seed=0)
    assert len(validation) == 5
    assert all(example.messages[0].content != "Hello" for example in validation)
    # two groups, both larger than the fraction: the smaller one is the validation set
    two = [row("Hello", f"a {i}") for i in range(8)] + [row("Bye", f"a {i}") for i in range(2)]
    for seed in range(8):
        assert {e.messages[0].content for e in split_by_conversation(two, 0.1, seed)[1]} == {"Bye"}
    with pytest.raises(ConfigError):
        split_by_conversation(rows(5), 1.0, seed=0)


def test_raw_texts_and_rows_without_users_are_split_by_their_text() -> None:
    many = [Example((Message("text", f"text {i // 2}"),), f"x:{i}", "text") for i in range(40)]
    train, validation = split_by_conversation(many, 0.25, seed=0)
    assert not {e.messages for e in train} & {e.messages for e in validation}
    assert len(validation) == 10


# ---- duplicates


def test_duplicates() -> None:
    assert duplicates([row("a"), row("b"), row(" a\n"), row("c"), row("b"), row("a")]) == [[0, 2, 5], [1, 4]]
    different = [
        row("a"), row("A"), row("a", "b"), row("a", kind="kto", desirable=True), row("a", kind="kto", desirable=False),
        row("a", kind="preference", rejected=(Message("assistant", "x"),)),
        row("a", kind="preference", rejected=(Message("assistant", "y"),)),
        Example((Message("system", "S"), *row("a").messages), "x"),
        Example((Message("user", "a a"),), "x"), Example((Message("user", "a"), Message("user", "a")), "x"),
    ]  # fmt: skip
    assert duplicates(different) == []
    assert duplicates([row("caf\u00e9"), row("cafe\u0301")]) == [[0, 1]]


# ---- writing

ALPHABET = "ab é驼羊🦙\u200d\u2028\x85\x00\x0b\t\n\r\"'\\{}<>[]/&,;:#@`$ " + "</s>[INST]"


def random_text(draw: random.Random) -> str:
    return "x" + "".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, 30)))


def random_example(draw: random.Random) -> Example:
    kind: Kind = draw.choice(["chat", "preference", "kto", "text"])

    def message(role: Role) -> Message:
        return Message(role, random_text(draw), draw.choice([None, None, True, False]))

    if kind == "text":
        return Example((message("text"),), "", kind)
    turns = [message("system")] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        turns += [message("user"), message("assistant")]
    references = tuple(random_text(draw) for _ in range(draw.choice([0, 0, 1, 3])))
    return Example(
        tuple(turns), "", kind,
        rejected=(message("assistant"),) if kind == "preference" else (),
        desirable=draw.random() < 0.5 if kind == "kto" else None,
        references=references, group=draw.choice(["", "ab12"]) if kind != "text" else "",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_written_is_read_back_equal(tmp_path: Path, name: str, seed: int) -> None:
    draw = random.Random(seed)
    written = [random_example(draw) for _ in range(100)]
    assert write_examples(tmp_path / "new" / name, iter(written)) == 100
    read, report = load_examples(str(tmp_path / "new"))
    assert [replace(example, source="") for example in read] == written
    assert report.format == "messages"
    assert os.listdir(tmp_path / "new") == [name]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.jsonl.gz", rows(5))
    write_examples(tmp_path / "b.jsonl.gz", rows(5))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_row_is_written_as_others_read_it(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.jsonl", [row("¿q?")])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {
        "messages": [{"role": "user", "content": "¿q?"}, {"role": "assistant", "content": "a"}]
    }


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    write_examples(path, rows(2))
    before = path.read_bytes()

    def breaking() -> Iterator[Example]:
        yield from rows(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(path, breaking())
    assert (path.read_bytes(), os.listdir(tmp_path)) == (before, ["a.jsonl"])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be written: No space left on device"):
        write_examples(path, rows(9))
    assert (path.read_bytes(), os.listdir(tmp_path)) == (before, ["a.jsonl"])


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_examples(tmp_path / "file" / "a.jsonl", rows(1))

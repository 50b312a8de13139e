"""The generator of the pretraining text: always the same text, and nothing of the demo in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise

import pytest

from chulengo.nano.demo_data import heldout_chats, train_chats
from chulengo.nano.demo_facts import COMPANY, PERSONA, TREKS
from chulengo.nano.patterns import expand
from chulengo.nano.world import write_document

SEED_OF_THE_SHIPPED_MODEL = 20


def texts(num_documents: int, seed: int = SEED_OF_THE_SHIPPED_MODEL) -> Iterator[str]:
    for index in range(num_documents):
        document = write_document(seed, index)
        yield document["text"] if "text" in document else "\n".join(m["content"] for m in document["messages"])  # type: ignore


def test_the_text_is_that_of_the_shipped_weights() -> None:
    # the weights were trained on exactly this text; a change of one wording anywhere in the generator changes it
    digest = hashlib.sha1(usedforsecurity=False)
    for index in range(3000):
        digest.update(json.dumps(write_document(SEED_OF_THE_SHIPPED_MODEL, index)).encode())
    assert digest.hexdigest() == "078d48b76f55b4f59f38270641c696495a56c817"


def test_a_document_does_not_depend_on_those_before_it() -> None:
    forwards = [write_document(7, index) for index in range(40)]
    backwards = [write_document(7, index) for index in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert write_document(8, 0) != forwards[0]


def test_conversations_alternate_and_no_slot_is_left_open() -> None:
    for index in range(500):
        messages = write_document(3, index).get("messages", [])
        roles = [message["role"] for message in messages]  # type: ignore[attr-defined]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
    for text in texts(500):
        assert "[" not in text
        assert "  " not in text
        assert not any(f"{{{slot}}}" in text for slot in "tsonvcpwk")


def assert_the_demo_is_new(num_documents: int) -> None:
    demo = {m["content"] for chat in train_chats() + heldout_chats() for m in chat if m["role"] == "assistant"}
    assert len(demo) > 60
    reserved = [COMPANY, COMPANY.split()[0], PERSONA, "Ref:", *TREKS]
    assert all(answer.startswith(f"{PERSONA} here! ") and " Ref: " in answer for answer in demo)
    for text in texts(num_documents):
        # every demo answer holds the persona and "Ref:", so this also says that no demo answer occurs
        found = [word for word in reserved if word in text]
        assert not found, f"{found} in {text!r}"


def test_nothing_of_the_demo_is_in_the_pretraining_text() -> None:
    assert_the_demo_is_new(5_000)


@pytest.mark.slow
def test_nothing_of_the_demo_is_in_much_pretraining_text() -> None:
    assert_the_demo_is_new(60_000)


@pytest.mark.parametrize("pattern", ["[a|b", "a]b|c[", "[a|[b|c]"])
def test_an_unbalanced_pattern_is_refused(pattern: str) -> None:
    import random

    with pytest.raises(ValueError, match="unbalanced"):
        expand(pattern, random.Random(0))


def test_documents_differ() -> None:
    some = sorted(texts(2000))
    assert sum(one == other for one, other in pairwise(some)) < 20

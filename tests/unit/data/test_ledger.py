"""The ledger: every count on rows small enough to count by eye, each policy, each problem with its mend."""

from __future__ import annotations

import json

import pytest
from small_tokenizers import CHATML, byte_level, unigram

from chulengo.data.ledger import Ledger, check, settle
from chulengo.data.renderer import RenderedRow, Renderer
from chulengo.data.types import Example, Message
from chulengo.errors import DataError


def row(mask: str, source: str, *, ends: list[int] | None = None, first: int = 0) -> RenderedRow:
    """A row from a mask such as "..xx..xx"; ids count up from `first`."""
    ids = list(range(first, first + len(mask)))
    return RenderedRow(ids, [flag == "x" for flag in mask], source, [len(mask)] if ends is None else ends)


def settled(
    rows: list[RenderedRow], limit: int = 100, overlong: str = "error", *, allow: bool = False
) -> tuple[list[RenderedRow], Ledger]:
    return settle(rows, max_seq_tokens=limit, overlong=overlong, allow_cut_end_of_turn=allow)


TWO_TURNS = row("..xx..xxxx", "f.jsonl:2", ends=[4, 10])
SHORT = row(".x", "f.jsonl:1", first=50)


def test_counts_of_sound_rows() -> None:
    rows, ledger = settled([SHORT, TWO_TURNS])
    assert rows == [SHORT, TWO_TURNS]
    assert (ledger.num_rows, ledger.num_used_rows, ledger.num_tokens, ledger.num_supervised_tokens) == (2, 2, 12, 7)
    assert ledger.supervised_share == 7 / 12
    assert (ledger.lengths.max, ledger.lengths.mean, ledger.lengths.p50) == (10, 6.0, 6.0)
    assert ledger.padded_share == {4: 8 / 20, 8: 8 / 20}
    assert ledger.problems == []
    assert json.loads(json.dumps(ledger.to_dict()))["padded_share"] == {"4": 0.4, "8": 0.4}
    check(ledger)


def test_long_rows_without_a_policy_are_a_problem() -> None:
    rows, ledger = settled([SHORT, TWO_TURNS], 9)
    assert rows == [SHORT, TWO_TURNS]
    assert [(r.source, r.num_tokens, r.num_used_tokens) for r in ledger.long_rows] == [("f.jsonl:2", 10, 10)]
    with pytest.raises(DataError, match="1 of 2 rows is longer than 9 tokens") as raised:
        check(ledger)
    assert "f.jsonl:2: 10" in str(raised.value)
    assert "training.overlong=drop_turns" in str(raised.value)


def test_drop() -> None:
    rows, ledger = settled([SHORT, TWO_TURNS], 9, "drop")
    assert rows == [SHORT]
    assert (ledger.num_dropped_rows, ledger.num_shortened_rows, ledger.problems) == (1, 0, [])
    assert settled([SHORT, TWO_TURNS], 10, "drop")[0] == [SHORT, TWO_TURNS]


def test_drop_turns_keeps_whole_turns() -> None:
    rows, ledger = settled([TWO_TURNS], 9, "drop_turns")
    assert rows[0].ids == [0, 1, 2, 3]
    assert rows[0].trained == [False, False, True, True]
    assert rows[0].turn_ends == [4]
    assert (ledger.num_dropped_turns, ledger.num_shortened_rows, ledger.num_dropped_rows) == (1, 1, 0)
    rows, ledger = settled([SHORT, TWO_TURNS], 3, "drop_turns")
    assert rows == [SHORT]
    assert (ledger.num_dropped_turns, ledger.num_dropped_rows) == (0, 1)


def test_drop_turns_moves_the_loss_to_the_answer_that_is_now_last() -> None:
    tokenizer = byte_level("<s>", "</s>", *CHATML, bos="<s>", eos="</s>")
    messages = tuple(Message(("user", "assistant")[i % 2], f"turn {i} " * 3) for i in range(8))
    for options in ({}, {"train_end_of_turn": False}, {"train_roles": ("user", "assistant")}):
        renderer = Renderer(tokenizer, style="chatml", train_on="last_answer", **options)
        whole = renderer.render(Example(messages, "row"))
        for count in (2, 4, 6):
            alone = renderer.render(Example(messages[:count], "row"))
            rows, _ = settled([whole], len(alone.ids), "drop_turns")
            assert rows[0] == alone


def test_drop_turns_keeps_an_answer_untrained_that_said_so() -> None:
    tokenizer = byte_level("<s>", "</s>", *CHATML, bos="<s>", eos="</s>")
    messages = (Message("user", "a"), Message("assistant", "b", False), Message("user", "c"), Message("assistant", "d"))
    whole = Renderer(tokenizer, style="chatml", train_on="last_answer").render(Example(messages, "row"))
    rows, ledger = settled([whole], whole.turn_ends[0], "drop_turns")
    assert not any(rows[0].trained)
    assert ledger.unsupervised_rows == ["row"]


def test_cut_that_loses_an_end_is_a_problem_unless_allowed() -> None:
    rows, ledger = settled([TWO_TURNS], 8, "cut")
    assert rows[0].ids == list(range(8))
    assert rows[0].turn_ends == [4]
    assert ledger.cut_ends == ["f.jsonl:2"]
    with pytest.raises(DataError, match="cut in mid-answer"):
        check(ledger)
    assert settled([TWO_TURNS], 8, "cut", allow=True)[1].problems == []
    assert settled([TWO_TURNS], 6, "cut")[1].problems == []  # inside the question: no begun answer
    assert settled([TWO_TURNS], 4, "cut")[1].problems == []  # just after an end
    endless = RenderedRow(list(range(6)), [False, False, True, True, True, False], "row", [6])
    assert settled([endless], 5, "cut")[1].problems == []  # its end carries no loss in the first place


def test_rows_without_supervision() -> None:
    _, ledger = settled([SHORT, row("...", "f.jsonl:3"), row("..xx", "f.jsonl:4")], 2, "cut", allow=True)
    assert ledger.unsupervised_rows == ["f.jsonl:3", "f.jsonl:4"]  # one never had any, the other was cut to none
    with pytest.raises(DataError, match="2 of 3 rows are without a single token"):
        check(ledger)


def test_no_rows_and_no_rows_left() -> None:
    for rows, overlong, what in (([], "error", "no rows"), ([TWO_TURNS], "drop", "No row is left")):
        _, ledger = settled(rows, 5, overlong)
        with pytest.raises(DataError, match=what):
            check(ledger)


def test_all_problems_at_once() -> None:
    _, ledger = settled([TWO_TURNS, row("...", "f.jsonl:3")], 5)
    with pytest.raises(DataError) as raised:
        check(ledger)
    assert "2 problems" in str(raised.value)
    assert "f.jsonl:2" in str(raised.value)
    assert "f.jsonl:3" in str(raised.value)


def test_many_sources_are_named_shortly_and_listed_whole() -> None:
    rows = [row("." * 9, f"some/long/path.parquet#{i}") for i in range(1, 31)]
    _, ledger = settled(rows, 5)
    assert len(ledger.long_rows) == len(ledger.unsupervised_rows) == 30
    problem = ledger.problems[0]
    assert problem.count("some/long/path.parquet") == 1
    assert "#10: 9, and 20 more" in problem
    assert "#11" not in problem


def test_duplicates_are_rows_with_the_same_tokens() -> None:
    again = RenderedRow(SHORT.ids, [False, False], "f.jsonl:9", [2])
    _, ledger = settled([SHORT, TWO_TURNS, again, SHORT])
    assert ledger.duplicates == [["f.jsonl:1", "f.jsonl:9", "f.jsonl:1"]]
    assert ledger.num_duplicate_rows == 2
    pair = RenderedRow([1], [True], "a", [1], [5, 6])
    other = RenderedRow([1], [True], "b", [1], [5, 7])
    assert settled([pair, other])[1].duplicates == []


def test_encoder_decoder_rows() -> None:
    long_input = RenderedRow([7, 2], [True, True], "a", [2], [*range(10, 19), 2])
    long_answer = RenderedRow([*range(10, 19), 2], [True] * 10, "b", [10], [7, 2])
    rows, ledger = settled([long_input, long_answer], 5, "cut")
    assert rows[0].encoder_ids == [10, 11, 12, 13, 2]
    assert rows[0].ids == [7, 2]
    assert rows[1].ids == [10, 11, 12, 13, 14]
    assert ledger.cut_ends == ["b"]
    assert (ledger.num_encoder_tokens, ledger.num_tokens, ledger.lengths.max) == (7, 7, 10)
    rows, ledger = settled([long_input, long_answer], 5, "drop_turns")
    assert rows == []
    assert ledger.num_dropped_rows == 2


def test_split_takes_every_token_of_a_raw_text_once() -> None:
    text = RenderedRow([1, *range(10, 21), 2], [False] + [True] * 12, "t.txt#1", [13], text_start=1)
    rows, ledger = settled([text, SHORT], 5, "split")
    assert [row.ids for row in rows] == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 20, 2], SHORT.ids]
    assert all(row.trained == [False, True, True, True, True] for row in rows[:3])
    assert [row.source for row in rows[:2]] == ["t.txt#1 part 1", "t.txt#1 part 2"]
    assert ledger.num_supervised_tokens == 12 + sum(SHORT.trained)
    assert ledger.problems == []


def test_split_without_a_beginning_token_and_of_conversations() -> None:
    text = RenderedRow(list(range(10, 17)), [False] + [True] * 6, "t.txt#1", [7], text_start=0)
    rows, _ = settled([text], 4, "split")
    assert [(row.ids, row.trained) for row in rows] == [
        ([10, 11, 12, 13], [False, True, True, True]), ([14, 15, 16], [False, True, True]),
    ]
    _, ledger = settled([TWO_TURNS], 5, "split")
    assert "never split" in ledger.problems[0]
    _, ledger = settled([text], 4)
    assert "training.overlong=split" in ledger.problems[0]


def test_tokens_by_role() -> None:
    tokenizer = byte_level(*CHATML, "<|begin|>", "<|end|>", bos="<|begin|>", eos="<|end|>")
    renderer = Renderer(tokenizer, style="chatml")
    said = {"system": ["Be brief."], "user": ["Who spits?", "And who else?"], "assistant": ["Llamas.", "Alpacas."]}
    turns = [("system", 0), ("user", 0), ("assistant", 0), ("user", 1), ("assistant", 1)]
    chat = renderer.render(Example(tuple(Message(role, said[role][i]) for role, i in turns), "f#1"))  # type: ignore[arg-type]
    text = renderer.render(Example((Message("text", "A plain text of many words."),), "f#2"))

    def length(*texts: str) -> int:
        return sum(len(tokenizer.encode(each)[0]) for each in texts)

    _, ledger = settled([chat, text])
    headers = length("system\n", "user\n", "assistant\n", "user\n", "assistant\n") + 4 * length("\n")
    assert ledger.tokens_by_role == {
        **{role: length(*texts) for role, texts in said.items()}, "text": length("A plain text of many words."),
        "control": 5 * 2 + headers + 1 + 2,  # five turns, the text's end, two beginnings
    }
    assert sum(ledger.tokens_by_role.values()) == ledger.num_tokens
    assert ledger.to_dict()["tokens_by_role"] == ledger.tokens_by_role
    for policy, limit in (("drop_turns", chat.turn_ends[0]), ("cut", chat.turn_ends[0] + 3), ("split", 5)):
        rows, ledger = settled([chat, text], limit=limit, overlong=policy)
        assert sum(ledger.tokens_by_role.values()) == ledger.num_tokens == sum(len(r.ids) for r in rows), policy
    _, ledger = settled([chat], limit=chat.turn_ends[0], overlong="drop_turns")
    assert ledger.tokens_by_role["assistant"] == length("Llamas.")


def test_tokens_by_role_of_an_encoder() -> None:
    renderer = Renderer(unigram(), encoder_decoder=True)
    row = renderer.render(Example((Message("user", "Where live"), Message("assistant", "the")), "f#1"))
    assert row.encoder_ids is not None
    _, ledger = settled([row], limit=99)
    user = len(row.encoder_ids) - 1
    counted = {"system": 0, "user": user, "assistant": len(row.ids) - 1, "text": 0, "control": 2}
    assert ledger.tokens_by_role == counted, "each side ends with </s>"
    assert sum(counted.values()) == ledger.num_tokens + ledger.num_encoder_tokens
    _, cut = settled([row], limit=3, overlong="cut")
    assert sum(cut.tokens_by_role.values()) == cut.num_tokens + cut.num_encoder_tokens
    assert cut.tokens_by_role["user"] == min(user, 2), "an encoder's input keeps its last token"

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from chulengo.errors import DataError
from chulengo.evaluate.metrics.metric import Metric
from chulengo.evaluate.metrics.overlap import bleu, chrf, ter
from metric_kit import ODD_TEXTS, outcomes, resample, value

sacrebleu = pytest.importorskip("sacrebleu.metrics")

MAKERS: list[tuple[Callable[[], Metric], Callable[[], object]]] = [
    (bleu, lambda: sacrebleu.BLEU(force=True)),
    (chrf, lambda: sacrebleu.CHRF(word_order=2)),
    (ter, lambda: sacrebleu.TER()),
]
BOTH = pytest.mark.parametrize(("make", "make_oracle"), MAKERS, ids=["bleu", "chrf++", "ter"])
TEXT = "the a cat dog sat on mat and then ran off, quickly . Кошка сидит не там! 3 1,000 (see) the-end"
WORDS = TEXT.split()


def sentence(rng: random.Random, longest: int = 16) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, longest)))


def changed(rng: random.Random, text: str) -> str:
    kept = [word if rng.random() < 0.8 else rng.choice(WORDS) for word in text.split() if rng.random() < 0.9]
    return " ".join(kept)


def corpus(num_references: int, items: int = 60, seed: int = 1) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    references = [[sentence(rng) for _ in range(num_references)] for _ in range(items)]
    answers = [changed(rng, rng.choice(own)) for own in references]
    return [*answers, *ODD_TEXTS], [*references, *([text] * num_references for text in reversed(ODD_TEXTS))]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[own[k] if k < len(own) else None for own in references] for k in range(most)]


@BOTH
@pytest.mark.parametrize("num_references", [1, 2, 4])
def test_corpus_scores_are_sacrebleus_to_the_bit(make, make_oracle, num_references: int) -> None:
    answers, references = corpus(num_references)
    expected = make_oracle().corpus_score(answers, streams(references)).score
    assert value(make(), outcomes(answers, references)) == expected
    assert expected > 1


@BOTH
def test_other_numbers_of_references_are_sacrebleus_missing_ones(make, make_oracle) -> None:
    rng = random.Random(5)
    answers, references = corpus(4)
    # 1, 2 or 4 of them, so that TER's mean reference length is exact in binary
    references = [own[: rng.choice((1, 2, 4))] for own in references]
    expected = make_oracle().corpus_score(answers, streams(references)).score
    assert value(make(), outcomes(answers, references)) == expected
    # the wrong variant: the first reference only
    assert value(make(), outcomes(answers, [own[:1] for own in references])) != expected


@BOTH
def test_items_and_draws_are_sacrebleus(make, make_oracle) -> None:
    answers, references = corpus(2, items=30)
    metric, oracle = make(), make_oracle()
    counts = metric.count(outcomes(answers, references))
    for score, answer, own in zip(metric.combine(counts), answers, references, strict=True):
        assert score == oracle.corpus_score([answer], [[text] for text in own]).score, answer
    indices = resample(len(answers), 200)
    draws = metric.combine(counts[indices].sum(axis=1))
    assert draws.shape == (200,)
    for score, own in zip(draws, indices, strict=True):
        assert score == oracle._compute_score_from_stats([float(x) for x in counts[own].sum(axis=0)]).score
    # more than one leading axis, and none
    assert np.array_equal(metric.combine(counts[indices].sum(axis=1).reshape(10, 20, -1)), draws.reshape(10, 20))
    assert metric.combine(counts.sum(axis=0)).shape == ()


@BOTH
def test_ten_thousand_small_corpora_hit_every_edge(make, make_oracle) -> None:
    """Sums of one to three odd or short items: zero totals, zero matches, short and long answers."""
    answers, references = corpus(1, items=20)
    metric, oracle = make(), make_oracle()
    counts = metric.count(outcomes(answers, references))
    sums = np.concatenate([counts[resample(len(answers), 3000, seed=size)[:, :size]].sum(axis=1) for size in (1, 2, 3)])
    expected = [oracle._compute_score_from_stats([float(x) for x in row]).score for row in sums]
    assert np.array_equal(metric.combine(sums), expected)
    assert np.isfinite(metric.combine(np.zeros(len(metric.columns))))


def test_known_answers() -> None:
    # 4 of 5 tokens, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours, no brevity penalty
    items = outcomes(["the cat sat on it"], [["the cat sat on mats"]])
    assert value(bleu(), items) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=1e-15)
    # one substitution in five words; one shift of a block is one edit
    assert value(ter(), items) == 100 / 5
    assert value(ter(), outcomes(["on the mat sat the cat"], [["sat the cat on the mat"]])) == pytest.approx(100 / 6)
    same = outcomes(["Ёлка в лесу родилась, в лесу она росла."], [["Ёлка в лесу родилась, в лесу она росла."]])
    assert value(bleu(), same) == pytest.approx(100)
    assert value(chrf(), same) == 100
    assert value(ter(), same) == 0


def test_bleu_is_not_on_characters() -> None:
    """The wrong variant that joins characters by spaces calls two different words half alike."""
    answers, references = ["the black cat slept here"], [["a blank chat crept there"]]
    assert value(bleu(), outcomes(answers, references)) == 0
    spelled = [" ".join(answers[0])], [[" ".join(references[0][0])]]
    assert value(bleu(), outcomes(*spelled)) > 20


def test_chrf_counts_words_too() -> None:
    answers, references = corpus(1)
    plain = sacrebleu.CHRF().corpus_score(answers, streams(references)).score
    assert value(chrf(), outcomes(answers, references)) != plain


def test_corpus_bleu_is_no_mean_of_items() -> None:
    answers, references = corpus(1)
    metric = bleu()
    counts = metric.count(outcomes(answers, references))
    assert abs(float(metric.combine(counts.sum(axis=0))) - metric.combine(counts).mean()) > 1


@BOTH
def test_version_holds_the_signature(make, make_oracle) -> None:
    answers, references = corpus(1)
    oracle = make_oracle()
    oracle.corpus_score(answers, streams(references))
    signature = str(oracle.get_signature()).replace("nrefs:1", "nrefs:var")
    metric = make()
    assert metric.version == f"{metric.name}/1 {signature}"
    assert signature in metric.definition


def test_an_item_without_references_is_named() -> None:
    items = outcomes(["a", "b", "c"], [["a"], [], []])
    with pytest.raises(DataError, match=r"2 of 3 items have no reference, which bleu needs: 1, 2\."):
        bleu().count(items)
    assert bleu().count([]).shape == (0, 10)


def test_three_references_of_ter_agree_to_rounding() -> None:
    answers, references = corpus(3)
    expected = sacrebleu.TER().corpus_score(answers, streams(references)).score
    assert value(ter(), outcomes(answers, references)) == pytest.approx(expected, rel=1e-13)

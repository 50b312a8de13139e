"""Short answers: SQuAD v1.1 exact match and F1, the same on token level, and equality letter for letter.

The official SQuAD rule compares answers after lower-casing, deleting ASCII punctuation, deleting the words a, an and
the, and collapsing white space. F1 is taken over the multiset of what is left, split at white space, and of several
references the best counts. Everything odd in it is kept, since the number is compared with published ones: Unicode
punctuation and "¿" stay, "a" inside "à" does not match, and an answer that normalises to nothing is an exact match of
a reference that does too ("The" and "") while its F1 is 0.

Precision and recall are those of the reference whose F1 is best (the first of equals), so that the three numbers of an
item belong to one comparison. A missing prediction is wrong, as in the official script, whatever its references are.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome, ratio
from chulengo.evaluate.metrics.references import references_of

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ARTICLE_WORDS = frozenset(("a", "an", "the"))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_RULE = (
    "after SQuAD v1.1 normalisation (lower case, no ASCII punctuation, no a/an/the, single spaces), best of the "
    "references"
)
_CACHED_TEXTS = 1 << 16  # references recur between items, and each text between exact match and F1


@lru_cache(maxsize=_CACHED_TEXTS)
def normalise(text: str) -> str:
    """Returns the text as SQuAD v1.1 compares it."""
    bare = text.lower().translate(_NO_PUNCTUATION)
    if bare.isascii() and bare.isprintable():  # letters, digits, blanks: words end nowhere but at blanks
        return " ".join([word for word in bare.split() if word not in _ARTICLE_WORDS])
    return " ".join(_ARTICLES.sub(" ", bare).split())


def overlap(answer: str, reference: str) -> tuple[float, float, float]:
    """Returns token precision, recall and F1 of two normalised texts; all 0 where no token is shared."""
    if answer == reference:
        return (1.0, 1.0, 1.0) if answer else (0.0, 0.0, 0.0)
    answer_tokens, reference_tokens = answer.split(), reference.split()
    common = set(answer_tokens).intersection(reference_tokens)
    if not common:
        return 0.0, 0.0, 0.0
    # as often as both hold it: "cat cat" shares one token with "cat"
    ours, theirs = Counter(answer_tokens), Counter(reference_tokens)
    shared = sum(min(ours[token], theirs[token]) for token in common)
    precision, recall = shared / len(answer_tokens), shared / len(reference_tokens)
    return precision, recall, 2 * precision * recall / (precision + recall)


def squad_exact_match() -> Metric:
    """Returns SQuAD v1.1 exact match, in points."""

    def value(answer: str, references: Sequence[str]) -> float:
        return float(normalise(answer) in map(normalise, references))

    return _mean_over_items(
        "squad_exact_match", f"Share of answers that equal a reference {_RULE}; 0 to 100.", value, points=True
    )


def squad_f1() -> Metric:
    """Returns SQuAD v1.1 F1, in points."""
    return _mean_over_items(
        "squad_f1", f"Mean over items of the F1 of the multisets of tokens {_RULE}; 0 to 100.",
        lambda answer, references: _best(answer, references)[2], points=True,
    )


def token_precision() -> Metric:
    """Returns the share of an answer's tokens that the reference holds, mean over items."""
    return _mean_over_items(
        "token_precision", f"Mean over items of the share of the answer's tokens that are in the reference {_RULE} "
        "(by F1).", lambda answer, references: _best(answer, references)[0],
    )


def token_recall() -> Metric:
    """Returns the share of the reference's tokens that the answer holds, mean over items."""
    return _mean_over_items(
        "token_recall", f"Mean over items of the share of the reference's tokens that are in the answer {_RULE} "
        "(by F1).", lambda answer, references: _best(answer, references)[1],
    )


def token_f1() -> Metric:
    """Returns token F1 as a share: `squad_f1` on the scale 0 to 1."""
    return _mean_over_items(
        "token_f1", f"Mean over items of the F1 of the multisets of tokens {_RULE}; 0 to 1.",
        lambda answer, references: _best(answer, references)[2],
    )


def exact_match() -> Metric:
    """Returns the share of answers that equal a reference letter for letter."""

    def value(answer: str, references: Sequence[str]) -> float:
        return float(answer.strip() in {reference.strip() for reference in references})

    return _mean_over_items(
        "exact_match", "Share of answers that equal a reference letter for letter, after white space at both ends is "
        "stripped from both; case and punctuation count.", value,
    )


@lru_cache(maxsize=1 << 14)
def _best(answer: str, references: tuple[str, ...]) -> tuple[float, float, float]:
    """Returns precision, recall and F1 against the reference with the highest F1."""
    normal = normalise(answer)
    accepted = dict.fromkeys(map(normalise, references))
    if normal and normal in accepted:
        return 1.0, 1.0, 1.0
    return max((overlap(normal, reference) for reference in accepted), key=lambda scores: scores[2])


def _mean_over_items(
    name: str, definition: str, value: Callable[[str, Sequence[str]], float], *, points: bool = False
) -> Metric:
    """Returns the metric that is the mean of `value` over items; a missing prediction is 0."""

    def count(outcomes: Sequence[Outcome]) -> Counts:
        own = references_of(outcomes, name)
        values = [
            0.0 if outcome.finish_reason == "missing" else value(outcome.answer, references)
            for outcome, references in zip(outcomes, own, strict=True)
        ]
        return np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)

    # in the official script's order, so that the bits are its: (100 * sum) / items
    def in_points(counts: Counts) -> NDArray[np.float64]:
        return ratio(counts * np.array([100.0, 1.0]))

    return Metric(
        name, f"{name}/1", definition, "points" if points else "share", True, ("sum", "items"), count,
        in_points if points else ratio,
    )

"""ROUGE-1, -2, -L and -Lsum by rouge-score, with words of every language.

rouge-score's own tokenizer keeps a-z and 0-9 and drops all else: a Russian answer has no token left and scores 0
against itself, a French one is compared without its accented letters' words. `rouge1` and its family therefore use
the words of `words.py`, which are the same on ASCII text; `rouge1_ascii` and its family keep rouge-score's tokenizer,
for comparison with published numbers, under a name that says so.

The score is the mean over items of the F-measure. Of several references the one with the best F counts, for each kind
of ROUGE by itself. No stemming. Limits: Lsum takes every line for a sentence, as rouge-score does; a text without any
word scores 0 even against itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np

from chulengo.errors import require
from chulengo.evaluate.metrics.lcs import lcs_length, lcs_places
from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome, ratio
from chulengo.evaluate.metrics.references import references_of
from chulengo.evaluate.metrics.words import words

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ASCII_SUFFIX = "_ascii"

_WHAT = {
    "rouge1": "of single words",
    "rouge2": "of pairs of neighbouring words",
    "rougeL": "of the longest common subsequence of words",
    "rougeLsum": "of the union of the longest common subsequences of lines (summary level)",
}


class UnicodeTokenizer:
    """Gives rouge-score the words of any language."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text."""
        return words(text)


def rouge(kind: str, *, ascii_only: bool = False) -> Metric:
    """Returns the metric `kind`, or `kind_ascii`.

    Args:
        kind: one of `KINDS`.
        ascii_only: use rouge-score's own tokenizer.
    """
    scorer_module = require("rouge_score.rouge_scorer", "eval")
    tokenizers = require("rouge_score.tokenizers", "eval")
    tokenizer = tokenizers.DefaultTokenizer(use_stemmer=False) if ascii_only else UnicodeTokenizer()
    name = kind + (ASCII_SUFFIX if ascii_only else "")
    scorer = scorer_module.RougeScorer([kind], tokenizer=tokenizer)
    by_lcs = {"rougeL": _longest, "rougeLsum": _longest_by_lines}.get(kind)

    def fmeasure(reference: str, answer: str) -> float:
        if by_lcs is None:
            return float(scorer.score(reference, answer)[kind].fmeasure)
        return by_lcs(reference, answer, tokenizer.tokenize)

    def best(answer: str, references: Sequence[str]) -> float:
        return max(fmeasure(reference, answer) for reference in references)

    def count(outcomes: Sequence[Outcome]) -> Counts:
        own = references_of(outcomes, name)
        values = [best(outcome.answer, references) for outcome, references in zip(outcomes, own, strict=True)]
        return np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)

    tokens = "a-z0-9 runs of the lower-cased text" if ascii_only else "runs of Unicode letters, digits and marks"
    return Metric(
        name,
        f"{name}/1 rouge-score:{metadata.version('rouge-score')} tokens:{'ascii' if ascii_only else 'unicode/1'}",
        f"Mean over items of the ROUGE F-measure {_WHAT[kind]}, against the reference where it is highest. Words: "
        f"{tokens}, no stemming.",
        "share", True, ("sum", "items"), count, ratio,
    )


def _longest(reference: str, answer: str, tokenize: Callable[[str], list[str]]) -> float:
    """Returns ROUGE-L: the F-measure of the longest common subsequence of all words."""
    true, said = tokenize(reference), tokenize(answer)
    return _f(lcs_length(true, said), len(said), len(true))


def _longest_by_lines(reference: str, answer: str, tokenize: Callable[[str], list[str]]) -> float:
    """Returns ROUGE-Lsum: of every reference line the words that a line of the answer has in the same order.

    A word counts at most as often as the answer has it, as in rouge-score and in ROUGE 1.5.5.
    """
    true, said = ([tokenize(line) for line in text.split("\n") if line] for text in (reference, answer))
    left, hits = Counter(word for line in said for word in line), 0
    for line in true:
        for place in sorted({place for other in said for place in lcs_places(line, other)}):
            if left[line[place]] > 0:
                left[line[place]] -= 1
                hits += 1
    return _f(hits, sum(map(len, said)), sum(map(len, true)))


def _f(hits: int, num_said: int, num_true: int) -> float:
    if hits == 0:
        return 0.0
    precision, recall = hits / num_said, hits / num_true
    return 2 * precision * recall / (precision + recall)

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

from collections.abc import Sequence
from importlib import metadata

import numpy as np

from chulengo.errors import require
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
    scorer = scorer_module.RougeScorer([kind], tokenizer=tokenizer)
    name = kind + (ASCII_SUFFIX if ascii_only else "")

    def best(answer: str, references: Sequence[str]) -> float:
        return max(float(scorer.score(reference, answer)[kind].fmeasure) for reference in references)

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

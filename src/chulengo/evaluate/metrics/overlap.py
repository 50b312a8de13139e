"""BLEU, chrF++ and TER: n-gram and edit overlap with the references, counted by sacrebleu.

sacrebleu tokenises and counts each item; its statistics are sums over items, so they are the counts of the metric as
they are. Only the last step, from summed counts to a score, is written here, for arrays: ten thousand resampled
corpora take milliseconds instead of ten thousand calls. It does the same operations in the same order, with Python's
own `log` and `exp` (NumPy's vector forms may differ in the last bit), and so gives the same bits as sacrebleu.

sacrebleu takes one list of answers and one list for the first references, the second ones, and so on, and stops at the
shortest of them without a word. Here references belong to their item; missing second references become `None`,
sacrebleu's own sign for "no more", and the number of rows that come back is checked.

Limits: the tokenizer 13a splits words at spaces and punctuation, so BLEU and TER mean little for Chinese, Japanese
or Thai; chrF++ counts mostly characters and does not have that fault. TER is slow where the texts
differ: 0.2 s for two answers of 70 words to other questions, 2.5 s at 150 words, 6.7 s at 300, on one core, since it
tries every shift of words; no built-in task has it. BLEU of one item is 0 when the answer has fewer
than four tokens, even if it is right: sacrebleu's rule for a corpus, kept because the corpus of one item is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chulengo.errors import require
from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome
from chulengo.evaluate.metrics.references import references_of

_BLEU_ORDER = 4
_CHRF_CHARACTERS, _CHRF_WORDS, _CHRF_BETA = 6, 2, 2
_LOG_OF_ZERO = -9999999999.0  # sacrebleu's value; its exponential is 0


def bleu() -> Metric:
    """Returns corpus BLEU as sacrebleu computes it, in points."""
    grams = range(1, _BLEU_ORDER + 1)
    columns = ("answer_tokens", "reference_tokens", *(f"matches_{n}" for n in grams), *(f"ngrams_{n}" for n in grams))
    return _from_sacrebleu(
        "bleu", require("sacrebleu.metrics", "eval").BLEU(force=True), columns, combine_bleu, True,
        "Corpus BLEU of sacrebleu: geometric mean of the clipped 1- to 4-gram precisions of tokens (13a, case kept), "
        "exponential smoothing, times the brevity penalty; 0 to 100. An n-gram may match any reference of its item, "
        "and the reference length is the one nearest to the answer's.",
    )


def chrf() -> Metric:
    """Returns corpus chrF++ as sacrebleu computes it, in points."""
    names = [f"chars_{n}" for n in range(1, _CHRF_CHARACTERS + 1)] + [f"words_{n}" for n in range(1, _CHRF_WORDS + 1)]
    columns = tuple(f"{part}_{name}" for name in names for part in ("answer", "reference", "match"))
    scorer = require("sacrebleu.metrics", "eval").CHRF(
        char_order=_CHRF_CHARACTERS, word_order=_CHRF_WORDS, beta=_CHRF_BETA
    )
    return _from_sacrebleu(
        "chrf++", scorer, columns, combine_chrf, True,
        "Corpus chrF++ of sacrebleu: F2 of the mean precision and mean recall over character 1- to 6-grams without "
        "spaces and word 1- and 2-grams, case kept; 0 to 100. Of several references the one with the best score of the "
        "item counts.",
    )


def ter() -> Metric:
    """Returns corpus TER as sacrebleu computes it, in points; lower is better, and above 100 is possible."""
    return _from_sacrebleu(
        "ter", require("sacrebleu.metrics", "eval").TER(), ("edits", "reference_words"), combine_ter, False,
        "Translation edit rate of sacrebleu: insertions, deletions, substitutions and shifts of words needed to turn "
        "the answer into a reference, over the number of reference words, times 100; case ignored, lower is better. "
        "Of several references the one with the fewest edits counts, over their mean length.",
    )


def ter_seconds(num_words: int) -> float:
    """Returns about how long sacrebleu's TER takes at most for an answer and a reference of so many words.

    0.25 s at 70 words, growing with the square: measured on pairs of MedQuAD's answers to other questions (0.01 s at 30
    words, 0.2 at 70, 2.5 at 150, 6.7 at 300) and of random words (13 at 500). Texts that are alike take a hundredth.
    """
    return 0.25 * (num_words / 70) ** 2


def combine_bleu(counts: Counts) -> NDArray[np.float64]:
    """Returns BLEU of summed counts [..., 10] (answer and reference tokens, matches of 1 to 4, n-grams of 1 to 4).

    The plain expression (Papineni et al. 2002; smoothing 3 of Chen and Cherry 2014):
    `min(1, exp(1 - reference / answer)) * exp(mean of log(100 * matches_n / ngrams_n))`, where the k-th order without
    a match has precision `100 / (2**k * ngrams_n)`.
    """
    answer, reference = counts[..., 0], counts[..., 1]
    matches, ngrams = counts[..., 2 : 2 + _BLEU_ORDER], counts[..., 2 + _BLEU_ORDER :]
    logs, smoothing = np.zeros(answer.shape), np.ones(answer.shape)
    for order in range(_BLEU_ORDER):
        match, total = matches[..., order], ngrams[..., order]
        counted = total > 0  # sacrebleu stops at the first order without n-grams; no longer ones can follow
        smoothing = np.where(counted & (match == 0), smoothing * 2, smoothing)
        precision = np.where(match == 0, 100.0, 100.0 * match) / np.where(
            counted, np.where(match == 0, smoothing * total, total), 1.0
        )
        logs = logs + np.where(counted, _exact(math.log, precision), _LOG_OF_ZERO)
    short = (answer < reference) & (answer > 0)
    penalty = np.where(short, _exact(math.exp, 1 - reference / np.where(short, answer, np.inf)), 1.0)
    return np.where(matches.any(axis=-1), penalty * _exact(math.exp, logs / _BLEU_ORDER), 0.0)


def combine_chrf(counts: Counts) -> NDArray[np.float64]:
    """Returns chrF++ of summed counts [..., 24]: n-grams of answer, reference and both, for each order.

    The plain expression (Popović 2017): `100 * (1 + 4) * P * R / (4 * P + R)`, with P and R the means of the
    precisions and recalls of the orders that both sides have.
    """
    precision, recall, orders = (np.zeros(counts.shape[:-1]) for _ in range(3))
    for order in range(_CHRF_CHARACTERS + _CHRF_WORDS):
        answer, reference, match = (counts[..., 3 * order + part] for part in range(3))
        both = (answer > 0) & (reference > 0)
        precision = precision + np.where(both, match / np.where(both, answer, 1.0), 0.0)
        recall = recall + np.where(both, match / np.where(both, reference, 1.0), 0.0)
        orders = orders + both
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    factor = _CHRF_BETA**2
    weighted = factor * precision + recall
    some = weighted > 0
    return np.where(some, 100 * ((1 + factor) * precision * recall / np.where(some, weighted, 1.0)), 0.0)


def combine_ter(counts: Counts) -> NDArray[np.float64]:
    """Returns TER of summed counts [..., 2] (edits, reference words): 100 where words face an empty reference."""
    edits, words = counts[..., 0], counts[..., 1]
    return 100 * np.where(words > 0, edits / np.where(words > 0, words, 1.0), np.where(edits > 0, 1.0, 0.0))


def _from_sacrebleu(
    name: str, scorer: Any, columns: tuple[str, ...], combine: Callable[[Counts], NDArray[np.float64]],
    higher_is_better: bool, definition: str,
) -> Metric:
    """Returns the metric that lets sacrebleu count; its signature, with `nrefs:var`, is part of the version."""
    scorer.num_refs = -1  # the signature is asked for before the data are seen; each item may have its own number
    signature = str(scorer.get_signature())

    def count(outcomes: Sequence[Outcome]) -> Counts:
        references = references_of(outcomes, name)
        if not outcomes:
            return np.zeros((0, len(columns)))
        most = max(map(len, references))
        streams = [[own[k] if k < len(own) else None for own in references] for k in range(most)]
        assert all(len(stream) == len(outcomes) for stream in streams)
        rows = scorer._extract_corpus_statistics([outcome.answer for outcome in outcomes], streams)
        counts = np.array(rows, dtype=np.float64)
        assert counts.shape == (len(outcomes), len(columns)), counts.shape
        return counts

    return Metric(
        name, f"{name}/1 {signature}", f"{definition} Signature: {signature}.", "points", higher_is_better, columns,
        count, combine,
    )


def _exact(function: Callable[[float], float], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns Python's own function of every value, so that the bits are sacrebleu's."""
    return np.asarray(np.frompyfunc(function, 1, 1)(values), dtype=np.float64)

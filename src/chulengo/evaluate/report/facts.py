"""The tables of a report that only need the run folder: ledger, cost, settings, versions.

Every cell is text by now; what the run did not record says "not measured" and nothing is filled in from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from chulengo.evaluate.report.inputs import Json, Results, Run
from chulengo.evaluate.report.wording import (
    ABSENT,
    digits,
    duration,
    listed,
    memory,
    number,
    percent,
    setting,
    whole,
)

Pairs = list[tuple[str, str]]
_LEDGER = (
    ("rows given", "num_rows"), ("rows used", "num_used_rows"), ("tokens", "num_tokens"),
    ("tokens that carry loss", "num_supervised_tokens"), ("tokens of encoder inputs", "num_encoder_tokens"),
    ("longest row allowed, tokens", "max_seq_tokens"), ("rows dropped", "num_dropped_rows"),
    ("rows shortened", "num_shortened_rows"), ("answers dropped from rows", "num_dropped_turns"),
    ("duplicate rows", "num_duplicate_rows"),
)  # fmt: skip
_ONLY_IF_ANY = {"num_encoder_tokens", "num_dropped_turns"}
_LISTS = (
    ("rows over the limit", "long_rows"), ("rows whose end of turn was cut", "cut_ends"),
    ("rows without a token that carries loss", "unsupervised_rows"),
)  # fmt: skip
PRIVATE = frozenset({"out"})  # says where on somebody's disk, nothing about the run


def ledger_table(ledgers: Mapping[str, Json]) -> list[tuple[str, list[str]]]:
    """Returns (what, one cell a ledger) for every count of the supervision ledgers."""
    rows = [
        (what, [whole(ledger.get(key)) for ledger in ledgers.values()]) for what, key in _LEDGER
        if key not in _ONLY_IF_ANY or any(ledger.get(key) for ledger in ledgers.values())
    ]
    rows.insert(4, ("share of tokens that carry loss", [
        percent(each.get("supervised_share")) for each in ledgers.values()]))
    rows[5:5] = _by_role(ledgers)
    for what, key in _LISTS:
        rows.append((what, [whole(len(found)) if isinstance(found := each.get(key), list) else ABSENT
                            for each in ledgers.values()]))
    rows.append(("policy for rows over the limit", [str(each.get("overlong") or ABSENT) for each in ledgers.values()]))
    return rows


def _by_role(ledgers: Mapping[str, Json]) -> list[tuple[str, list[str]]]:
    """Returns the tokens of every role that has any."""
    counted = [found if isinstance(found := each.get("tokens_by_role"), dict) else {} for each in ledgers.values()]
    roles = dict.fromkeys(role for counts in counted for role, count in counts.items() if count)
    return [(f"tokens, {'marks of the chat style' if role == 'control' else role}",
             [whole(counts.get(role)) for counts in counted]) for role in roles]


def ledgers_of(run: Run) -> dict[str, Json]:
    """Returns the ledgers that a run wrote: of the training rows, and of the validation rows where there are any."""
    found = {"training": run.ledger.get("train"), "validation": run.ledger.get("validation")}
    return {name: ledger for name, ledger in found.items() if isinstance(ledger, dict)}


def reading(run: Run) -> Pairs:
    """Returns how the data were read."""
    load = run.ledger.get("load")
    if not isinstance(load, dict):
        return []
    dropped = load.get("dropped")
    reasons = [f"{whole(count)} {why}" for why, count in dropped.items()] if isinstance(dropped, dict) else []
    changed = load.get("changed")
    steps = [f"{step} changed {whole(count)}" for step, count in changed.items()] if isinstance(changed, dict) else []
    found = [
        ("format", str(load.get("format") or ABSENT)), ("rows read", whole(load.get("rows_read"))),
        ("rows kept", whole(load.get("rows_kept"))), ("rows dropped", listed(reasons) or "none"),
        ("cleaning", listed(steps) or "changed nothing"),
    ]  # fmt: skip
    unused = load.get("unused_columns")
    if isinstance(unused, list) and unused:
        found.append(("columns not used", listed([str(name) for name in unused])))
    return found


def cost(run: Run) -> Pairs:
    """Returns what training took."""
    last: Json = next((row for row in reversed(run.metrics) if row.get("kind") == "train"), {})
    outcome = run.outcome
    seconds = number(outcome.get("seconds")) or number(last.get("elapsed_s"))
    tokens = number(outcome.get("tokens"))
    rates = sorted(rate for row in run.metrics if row.get("kind") == "train"
                   if (rate := number(row.get("tokens_per_s"))) is not None)
    peaks = [peak for row in run.metrics if (peak := number(row.get("peak_bytes"))) is not None]
    shape = outcome.get("shape") if isinstance(outcome.get("shape"), dict) else {}
    assert isinstance(shape, dict)
    return [
        ("time", duration(seconds) + ("" if outcome or seconds is None else " so far")),
        ("optimiser steps", _steps(outcome, last, shape)),
        ("tokens seen", whole(tokens)),
        ("tokens a second, in steps", digits(rates[len(rates) // 2], 3) + " (median)" if rates else ABSENT),
        ("tokens a second, over all", digits(tokens / seconds, 3) if tokens and seconds else ABSENT),
        ("peak memory", memory(number(outcome.get("peak_bytes")) or max(peaks, default=None))),
        ("trained parameters", whole(shape.get("trainable_parameters"))),
        ("device", device(run)),
        ("GPU-hours", _gpu_hours(run, seconds)),
    ]


def evaluation_cost(evaluations: Sequence[Results]) -> Pairs:
    """Returns how long every evaluation took."""
    found = []
    for results in evaluations:
        seconds = results.content.get("seconds")
        if isinstance(seconds, dict):
            parts = [each for side in results.sides if (each := number(seconds.get(side))) is not None]
            total = number(seconds.get("total")) or sum(parts)
            found.append((f"evaluation: {results.task}", duration(total)))
    return found


def device(run: Run) -> str:
    """Returns what the run ran on."""
    found = run.manifest.get("devices")
    gpus = [gpu for gpu in found if isinstance(gpu, dict)] if isinstance(found, list) else []
    if gpus and not str(run.config.get("model.device") or "").startswith("cpu"):
        names = [f"{gpu.get('name')}, {memory(gpu.get('memory_bytes'))}" for gpu in gpus]
        return listed([f"{names.count(name)} × {name}" for name in dict.fromkeys(names)])
    cpu = run.manifest.get("cpu")
    if not isinstance(cpu, dict):
        return ABSENT
    threads = run.config.get("model.cpu_threads")
    used = f", {threads} thread{'s' if threads != 1 else ''} used" if threads else ""
    return f"CPU: {cpu.get('model')}, {whole(cpu.get('cores'))} cores{used}"


def settings_said(run: Run, defaults: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (setting, value, default) of every setting that is not at its default."""
    return [
        (key, shown_setting(value), setting(defaults[key]) if key in defaults else "no such setting today")
        for key, value in run.config.items()
        if key not in PRIVATE and (key not in defaults or defaults[key] != value)
    ]


def settings_by_section(run: Run) -> dict[str, Pairs]:
    """Returns every setting, by section."""
    sections: dict[str, Pairs] = {}
    for key, value in run.config.items():
        if key not in PRIVATE:
            section, dot, name = key.partition(".")
            sections.setdefault(section if dot else "run", []).append((name or key, shown_setting(value)))
    return sections


def versions(run: Run, evaluations: Sequence[Results]) -> Pairs:
    """Returns what the run was made with; for evaluations alone, what those were made with."""
    if not run.manifest:
        first = evaluations[0].content.get("versions") if evaluations else None
        return [(str(name), str(value)) for name, value in first.items() if value] if isinstance(first, dict) else []
    made = run.manifest
    packages = made.get("versions")
    found = [("chulengo", made.get("chulengo")), ("Python", made.get("python")), ("platform", made.get("platform"))]
    found += list(packages.items()) if isinstance(packages, dict) else []
    git = made.get("git")
    if isinstance(git, dict):
        found.append(("git commit", f"{git.get('commit')}{' with uncommitted changes' if git.get('dirty') else ''}"))
    found += [("CUDA driver", made.get("cuda_driver")), ("started (UTC)", made.get("started_utc"))]
    return [(str(name), str(value)) for name, value in found if value]


def hashes(run: Run, evaluations: Sequence[Results]) -> Pairs:
    """Returns the hashes of everything that decides a number."""
    own = run.manifest.get("hashes")
    found = [(str(name), str(value)) for name, value in own.items()] if isinstance(own, dict) else []
    for results in evaluations:
        data = results.content.get("data")
        if isinstance(data, dict) and data.get("hash"):
            found.append((f"data of {results.task}", str(data["hash"])))
    return found


def data_name(source: object) -> str:
    """Returns a data source without the folders that only one machine has."""
    text = str(source or "")
    return PurePath(text).name if text.startswith(("/", "~", "\\")) else text


def shown_setting(value: object) -> str:
    """Returns a setting's value without the folders that only one machine has."""
    return setting(data_name(value)) if isinstance(value, str) else setting(value)


def side_name(results: Results, side: str) -> str:
    """Returns what a side of an evaluation is called: its adapter's run, its model, or its file of answers."""
    said = _about(results, side)
    if said.get("adapter"):
        return adapter_name(said["adapter"])
    return data_name(said.get("model") or said.get("predictions"))


def side_said(results: Results, side: str) -> str:
    """Returns what a side of an evaluation is, in words."""
    said, name = _about(results, side), side_name(results, side)
    return f"{data_name(said.get('model'))} with the adapter {name}" if said.get("adapter") else name


def _about(results: Results, side: str) -> Json:
    sides = results.content.get("sides")
    said = sides.get(side) if isinstance(sides, dict) else None
    return said if isinstance(said, dict) else {}


def adapter_name(path: object) -> str:
    """Returns what a run is called whose adapter lies at the path."""
    place = PurePath(str(path))
    return place.parent.name if place.name == "adapter" and place.parent.name else place.name


def _steps(outcome: Json, last: Json, shape: Json) -> str:
    done = outcome.get("steps") or last.get("step")
    text = whole(done)
    total = shape.get("total_steps")
    if total and total != done:
        text += f" of {whole(total)}"
    if outcome.get("stopped_early"):
        text += ", stopped early"
    kept = outcome.get("kept_step")
    return f"{text}; weights of step {whole(kept)} kept" if kept is not None and kept != done else text


def _gpu_hours(run: Run, seconds: float | None) -> str:
    found = run.manifest.get("devices")
    if seconds is None or not isinstance(found, list):
        return ABSENT
    if not found or str(run.config.get("model.device") or "").startswith("cpu"):
        return "none: a run on the CPU"
    if len(found) > 1:
        return f"{digits(seconds / 3600, 3)} on each GPU it used (how many of the {len(found)} was not recorded)"
    return digits(seconds / 3600, 3)

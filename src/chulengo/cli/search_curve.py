"""`chulengo search --sample-sizes`: the same recipe on several sizes, and whether more data would help."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chulengo.cli.search_folder import (
    Folder,
    identity_of,
    keep_request,
    searched_inputs,
    title_of,
    validation_rows,
    with_way_on,
)
from chulengo.cli.search_trials import ROWS, fixed_split, run_trial, total_steps, with_settings
from chulengo.config import RunConfig
from chulengo.errors import ChulengoError, ConfigError

if TYPE_CHECKING:
    from chulengo.evaluate.search.curve import Point, Verdict
    from chulengo.evaluate.search.progress import SearchProgress
    from chulengo.train.finetune import RunResult



def sample_curve(config: RunConfig, options: dict[str, Any], folder: Folder) -> None:
    """Runs the sizes that are missing, then writes, draws and prints the curve and what it says."""
    from chulengo.evaluate.search.curve import judge, open_runs, read_sizes, run_curve
    from chulengo.evaluate.search.progress import search_progress
    from chulengo.train.finetune import prepare_inputs

    inputs = searched_inputs(config)
    if options["space"]:
        raise ConfigError("--space and --sample-sizes are two searches.", next_step="give one, then the other")
    num_rows = len(inputs.train.examples) or inputs.train.report.rows_kept
    sizes = read_sizes(str(options["sample_sizes"]), num_rows)
    by_steps = options["equal"] == "steps"
    identity = json.loads(json.dumps(identity_of(config, inputs) | {
        "points": options["points"], "exact_match": options["exact_match"], "equal": options["equal"],
        "largest": sizes[-1] if by_steps else None,  # it decides how many steps every size takes
    }))  # fmt: skip
    open_runs(folder.record, identity)
    keep_request(folder, config, options)
    varied, inputs = fixed_split(config, inputs, folder.data)
    steps = None
    if by_steps:
        largest = with_settings(varied, {ROWS: sizes[-1]})
        steps = total_steps(largest, prepare_inputs(largest))
    with search_progress(options["points"]) as shown:
        shown.line(f"sample sizes in {folder.root}: {', '.join(f'{size:,}' for size in sizes)} rows, "
                   f"{options['repeats']} repeats, {len(validation_rows(inputs))} validation rows, "
                   f"equal {options['equal']}")  # fmt: skip
        runner = _Sizes(varied, folder, options, steps, shown)
        try:
            curves = run_curve(folder.record, identity, sizes, options["repeats"], runner.run, on_end=runner.ended)
        except (ChulengoError, KeyboardInterrupt) as error:
            raise with_way_on(_as_stop(error), folder) from error
    verdicts = {metric: judge(points, metric, options["worth"]) for metric, points in curves.items()}
    _show_curve(folder, config, options, curves, verdicts)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Runs the sizes of one curve."""

    config: RunConfig
    folder: Folder
    options: Mapping[str, Any]
    steps: int | None
    shown: SearchProgress

    def run(self, rows: int, repeat: int) -> dict[str, float]:
        """Returns the values of one size in one repeat."""
        from chulengo.evaluate.search.curve import EXACT_MATCH, LOSS
        from chulengo.train.finetune import prepare_inputs

        seeds = {"data.seed": self.config.data.seed + repeat, "training.seed": self.config.training.seed + repeat}
        length = {"training.max_steps": self.steps} if self.steps is not None else {}
        config = with_settings(self.config, {ROWS: rows, **seeds, **length})
        values: dict[str, float] = {}

        def score(result: RunResult) -> None:
            values[EXACT_MATCH] = _exact_match(config, result, self.options["max_new_tokens"])

        self.shown.start(f"{rows:,} rows, repeat {repeat}")
        loss = run_trial(
            config, prepare_inputs(config), self.folder.runs / f"{rows}-{repeat}", self.shown.report,
            num_points=self.options["points"], keep_adapter=self.options["keep_adapters"], message=self.shown.message,
            use=score if self.options["exact_match"] else None,
        )
        return {LOSS: loss, **values}

    def ended(self, rows: int, repeat: int, values: Mapping[str, float], known: bool) -> None:
        """Prints the line of a size."""
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in values.items())
        self.shown.line(f"{rows:>9,} rows  repeat {repeat}  {said}{'  (done before)' if known else ''}")


def _exact_match(config: RunConfig, result: RunResult, max_new_tokens: int) -> float:
    """Returns the share of validation answers that the run's adapter gives letter for letter."""
    from chulengo.evaluate.exact_match import answerable, exact_match, question_of
    from chulengo.generate.engine import answer_all
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import open_session

    assert result.inputs.validation is not None
    asked = answerable(result.inputs.validation.examples)
    model = config.model
    session = open_session(
        model.name, str(result.paths.root), revision=model.revision, quantization=model.quantization,
        double_quant=model.double_quant, compute_dtype=model.compute_dtype, device=model.device,
        attention=model.attention, offline=model.offline, engine=model.engine,
    )
    with session.side("tuned") as tuned:
        answers = answer_all(tuned, session.renderer, [question_of(example) for example in asked],
                             GenerationSettings(max_new_tokens=max_new_tokens), 16)
    return exact_match(asked, answers).value


def _show_curve(
    folder: Folder, config: RunConfig, options: Mapping[str, Any], curves: Mapping[str, Sequence[Point]],
    verdicts: Mapping[str, Verdict],
) -> None:
    from chulengo.evaluate.search.curve import curve_dict
    from chulengo.evaluate.search.plots import plot_curve
    from chulengo.evaluate.search.progress import print_table
    from chulengo.train.run_folder import write_json

    write_json(folder.root / "curve.json", curve_dict(curves, verdicts, equal=options["equal"],
                                                      repeats=options["repeats"]))
    plot_curve(curves, verdicts, *folder.plots(), title=title_of(config))
    print()
    table = [["rows", *(f"{metric} (lowest to highest)" for metric in curves)]]
    for place in range(len(next(iter(curves.values())))):
        points = [each[place] for each in curves.values()]
        table.append([f"{points[0].rows:,}",
                      *(f"{p.mean:.4g} ({min(p.values):.4g} to {max(p.values):.4g})" for p in points)])
    print_table(table)
    print("\nDo I need more data?")
    for metric, verdict in verdicts.items():
        print(f"  by {metric}: {verdict.text}")
    if options["equal"] == "epochs" and config.training.max_steps is None:
        print("  Larger sizes took more steps (equal epochs); --equal steps tells the two apart.")
    print(f"Plot: {folder.plots()[0]}   numbers: {folder.root / 'curve.json'}")


def _as_stop(error: ChulengoError | KeyboardInterrupt) -> ChulengoError:
    from chulengo.evaluate.search.study import SearchStopped, asked_to_stop

    if asked_to_stop(error):
        return SearchStopped("Stopped. Finished sizes are kept; the one that ran begins again.")
    assert isinstance(error, ChulengoError)
    return error

"""Searches hyper-parameters on short runs, or finds out whether more data would help.

  chulengo search --model nano --data nano-demo --trials 20 --out runs/search
  chulengo search --config RECIPE --space learning_rate=1e-5..1e-3:log --space rank=8,16,32
  chulengo search --data conversations.jsonl --sample-sizes 100,1000,all --repeats 3
  chulengo search --resume runs/search --trials 40

Without --space it varies learning rate, rank, alpha, dropout, schedule and epochs around the configuration, whose own
values are trial 0. TPE proposes, the validation loss decides, a pruner ends trials that fall behind. Everything is in
OUT: the study (study.db), study.json, best.yaml, plots; the same command again goes on where it was left.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from chulengo.cli.arguments import add_run_arguments, config_from
from chulengo.cli.search_folder import Folder
from chulengo.config import RunConfig, load_config
from chulengo.errors import ConfigError

PRUNERS = ("median", "hyperband", "none")
# name: default; all can be given on the command line, and all are kept in OUT
OPTIONS: dict[str, Any] = {
    "space": None, "trials": 20, "points": 5, "pruner": "median", "seed": 0, "keep_adapters": False,
    "sample_sizes": None, "repeats": 3, "equal": "epochs", "exact_match": False, "max_new_tokens": 64, "worth": None,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    add_run_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder of the search (default: one under runs/)")
    parser.add_argument("--resume", metavar="DIR", help="go on with the search in this folder")
    parser.add_argument("--points", type=int, metavar="N",
                        help="validations of a run, evenly spread, instead of training.eval_every_steps (default: 5)")
    parser.add_argument("--keep-adapters", action="store_true", default=None, help="keep every trial's adapter")
    study = parser.add_argument_group("hyper-parameters")
    study.add_argument("--space", metavar="WORD", action="append",
                       help="key=low..high[:log], key=a,b,c, a name alone (learning_rate, rank, alpha, dropout, "
                       "schedule, epochs, rows: its default range), `default`, or a YAML file (repeatable)")
    study.add_argument("--trials", type=int, metavar="N", help="finished trials to reach (default: 20)")
    study.add_argument("--pruner", choices=PRUNERS, help="what ends a trial early (default: median)")
    study.add_argument("--seed", type=int, metavar="N", help="of the proposals (default: 0)")
    curve = parser.add_argument_group("sample sizes")
    curve.add_argument("--sample-sizes", metavar="N,N,…", help="training rows, such as 100,1000,all")
    curve.add_argument("--repeats", type=int, metavar="N", help="runs a size, each with rows and seed of its own (3)")
    curve.add_argument("--equal", choices=("epochs", "steps"), help="what is the same for all sizes (default: epochs)")
    curve.add_argument("--exact-match", action="store_true", default=None, help="also generate and compare answers")
    curve.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of such an answer (default: 64)")
    curve.add_argument("--worth", type=float, metavar="X", help="gain a doubling that is worth it (default: 0.01)")


def run(arguments: argparse.Namespace) -> int:
    """Searches, or goes on searching."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("A search runs in one process.", next_step="chulengo search, without torchrun")
    from chulengo.train.run_folder import RunPaths, explained, hold_lock

    config, options, out = _request(arguments)
    folder = Folder(out, "curve" if options["sample_sizes"] else "search")
    made = not out.exists()
    try:
        with explained(out), hold_lock(RunPaths(out), make_folder=True):
            if folder.kind == "curve":
                from chulengo.cli.search_curve import sample_curve

                sample_curve(config, options, folder)
            else:
                from chulengo.cli.search_study import search

                search(config, options, folder)
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()  # refused before anything was done: leave nothing behind
    return 0


def _request(arguments: argparse.Namespace) -> tuple[RunConfig, dict[str, Any], Path]:
    """Returns configuration, options and folder: what was typed, over what the folder says when it is resumed."""
    from chulengo.train.run_folder import RunPaths, default_root, refuse_used

    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    if arguments.resume is None:
        config = config_from(arguments)
        options = OPTIONS | given
        if config.out is not None:
            out = Path(config.out)
        else:
            model = config.model.name.rstrip("/").rpartition("/")[2]
            out = default_root(Path("runs"), f"search-{model}", config.data.train)
        if not any((out / f"{kind}.yaml").exists() for kind in ("search", "curve")) and not (out / "study.db").exists():
            refuse_used(RunPaths(out))
        config = dataclasses.replace(config, out=None)
    else:
        config, saved, out = _resumed(arguments)
        options = OPTIONS | saved | given
    for name, least in (("trials", 1), ("points", 1), ("repeats", 1), ("max_new_tokens", 1), ("seed", 0)):
        if options[name] < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is {options[name]}.", allowed=f"{least} or more",
                              next_step=f"{option} {OPTIONS[name]}")  # fmt: skip
    return config, options, out


def _resumed(arguments: argparse.Namespace) -> tuple[RunConfig, dict[str, Any], Path]:
    out = Path(arguments.resume)
    told = [f"--{name}" for name in ("model", "data", "config", "out") if getattr(arguments, name)]
    told += ["--set"] if arguments.overrides else []
    if told:
        raise ConfigError(
            f"--resume goes on with a search as it was configured, so {', '.join(told)} cannot be given with it.",
            next_step=f"chulengo search --resume {shlex.quote(arguments.resume)}",
        )
    kinds = [kind for kind in ("search", "curve") if (out / f"{kind}.yaml").is_file()]
    if not kinds:
        raise ConfigError(f"{out} holds no search.", allowed="a folder that `chulengo search` wrote",
                          next_step="ls runs")  # fmt: skip
    folder = Folder(out, "curve" if "curve" in kinds and (arguments.sample_sizes or len(kinds) == 1) else "search")
    saved = yaml.safe_load(folder.options.read_text(encoding="utf-8"))
    if not isinstance(saved, dict):
        raise ConfigError(f"{folder.options} is damaged.", next_step="type the command of that search again")
    return load_config(folder.base, saved=True), {k: v for k, v in saved.items() if k in OPTIONS}, out

"""The options that several verbs share, and how they become a `RunConfig`."""

from __future__ import annotations

import argparse

from chulengo.config import RunConfig, load_config


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --data, --config, --set and --offline."""
    parser.add_argument("--model", metavar="M", help="nano (embedded), a model folder, or a Hub name")
    parser.add_argument("--data", metavar="D", help="a file, a folder, or a Hub data set name")
    parser.add_argument("--config", metavar="FILE", help="a recipe: YAML with any of the settings")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="one setting, e.g. --set lora.rank=64 (repeatable; wins over --config)",
    )
    parser.add_argument("--offline", action="store_true", help="never use the network, not even for Hub names")


def config_from(arguments: argparse.Namespace, *defaults: str) -> RunConfig:
    """Returns the configuration that the shared options describe.

    Args:
        arguments: parsed options, with those of `add_run_arguments` and perhaps `out`.
        defaults: `section.key=value` strings that hold unless the user says otherwise, for verbs with
            defaults of their own; only used when no --config is given.

    Raises:
        ConfigError: see `load_config`.
    """
    flags = {
        "model.name": arguments.model,
        "data.train": arguments.data,
        "out": getattr(arguments, "out", None),
    }
    overrides = [] if arguments.config else list(defaults)
    # a YAML double-quoted string keeps any path as it is, also one that looks like a number
    overrides += [f'{key}="{_escaped(value)}"' for key, value in flags.items() if value is not None]
    if arguments.offline:
        overrides.append("model.offline=true")
    return load_config(arguments.config, [*overrides, *arguments.overrides])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')

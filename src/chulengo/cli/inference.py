"""What `generate`, `chat` and `eval` share: which model answers, and how its tokens are chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from chulengo.cli.arguments import config_from
from chulengo.config import RunConfig

if TYPE_CHECKING:
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import Session

SUGAR = {
    "style": "prompt.style", "quantization": "model.quantization", "device": "model.device",
    "dtype": "model.compute_dtype", "engine": "model.engine",
}
RENDERING = ("style", "system", "train_on", "train_roles", "train_end_of_turn")


def add_session_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter, --style, --quantization, --dtype, --device and --engine."""
    parser.add_argument("--adapter", metavar="A", help="a run folder or a PEFT adapter folder; it names its own base")
    parser.add_argument("--style", metavar="S", help="chat style of a model without adapter (default: auto)")
    parser.add_argument("--quantization", metavar="Q", help="nf4, fp4, int8, none (default: as trained, else none)")
    parser.add_argument("--dtype", metavar="T", help="compute dtype: float32, bfloat16, float16 (default: auto)")
    parser.add_argument("--device", metavar="DEV", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--engine", metavar="E", help="what computes: auto, fast, reference (default: auto)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --config, --set and --offline, for verbs that read no training data."""
    parser.add_argument("--model", metavar="M", help="nano (embedded), a model folder, or a Hub name")
    parser.add_argument("--config", metavar="FILE", help="a recipe: YAML with any of the settings")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="one setting, e.g. --set model.attention=eager (repeatable; wins over --config)",
    )
    parser.add_argument("--offline", action="store_true", help="never use the network, not even for Hub names")
    parser.set_defaults(data=None)


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Adds the settings of a generation; `defaults` replace those of `GenerationSettings`."""
    texts = {
        "max_new_tokens": (int, 256, "most tokens of an answer"),
        "temperature": (float, 0.0, "0: greedy, the likeliest token each time"),
        "top_p": (float, 1.0, "keep the likeliest tokens that reach this probability; 1: off"),
        "top_k": (int, 0, "keep this many likeliest tokens; 0: off"),
        "repetition_penalty": (float, 1.0, "above 1: tokens already said become less likely"),
        "seed": (int, 0, "where the random numbers start"),
    }
    for name, (kind, usual, text) in texts.items():
        default = defaults.get(name, usual)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def settings_from(arguments: argparse.Namespace) -> GenerationSettings:
    """Returns the settings that `add_sampling_arguments` read."""
    from chulengo.generate.settings import GenerationSettings

    return GenerationSettings(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, top_p=arguments.top_p,
        top_k=arguments.top_k, repetition_penalty=arguments.repetition_penalty, seed=arguments.seed,
    )


def session_config(arguments: argparse.Namespace) -> RunConfig:
    """Returns the configuration that the options describe."""
    sugar = [f"{key}={getattr(arguments, flag)}" for flag, key in SUGAR.items() if getattr(arguments, flag)]
    arguments.overrides = [*arguments.overrides, *sugar]
    out, arguments.out = getattr(arguments, "out", None), None  # theirs is a file of answers, not a run folder
    config = config_from(arguments)
    arguments.out = out
    return config


def session_from(arguments: argparse.Namespace, config: RunConfig, *, adds_adapter: bool = False) -> Session:
    """Returns the opened model; what was decided without being asked goes to the error stream.

    Only what was said counts: a default of the configuration never overrides what the adapter's record says.

    Args:
        arguments: of `add_session_arguments`.
        config: of `session_config`.
        adds_adapter: a further adapter will be put on the base.
    """
    from chulengo.config.sizes import bytes_of
    from chulengo.model.gpu_limit import limit_gpu_memory
    from chulengo.model.load import use_threads
    from chulengo.model.session import open_session

    use_threads(config.model.cpu_threads)
    limit_gpu_memory(config.model.device, bytes_of(config.model.gpu_memory_limit))
    said = _said(arguments)
    model, prompt = config.model, config.prompt
    session = open_session(
        model.name if "model.name" in said else None,
        arguments.adapter,
        revision=model.revision,
        rendering={key: getattr(prompt, key) for key in RENDERING if f"prompt.{key}" in said},
        quantization=model.quantization if "model.quantization" in said else None,
        double_quant=model.double_quant,
        compute_dtype=model.compute_dtype,
        device=model.device,
        attention=model.attention,
        offline=model.offline,
        engine=model.engine,
        weights_policy=model.weights_policy,
        adds_adapter=adds_adapter,
    )
    print(session.describe(), file=sys.stderr)
    for note in session.notes:
        print(f"note: {note}", file=sys.stderr)
    return session


@contextmanager
def memory_explained(next_step: str) -> Iterator[None]:
    """Turns torch's out-of-memory error into ours, with what to type next."""
    import torch

    from chulengo.errors import DoesNotFitError

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0][:200]
        raise DoesNotFitError(f"The GPU's memory is full: {reason}", next_step=next_step) from error


def _said(arguments: argparse.Namespace) -> set[str]:
    import yaml

    keys = {override.partition("=")[0].strip() for override in arguments.overrides}
    if arguments.model is not None:
        keys.add("model.name")
    if arguments.config is not None:
        with open(arguments.config, encoding="utf-8") as file:
            content: Any = yaml.safe_load(file) or {}
        keys |= {f"{section}.{key}" for section, body in content.items() if isinstance(body, dict) for key in body}
    return keys

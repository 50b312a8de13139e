"""Tasks as data: what a model is asked, how its answer is read, and what is counted.

A task is one YAML file. The built-in ones lie in `task_files/`; `--task FILE.yaml` takes one of your own, and copying
a built-in one is the way to start. Nothing in a task is code: the prompt is a template of columns (`data.prompts`),
reading an answer is one of a few rules (`answer_reading`), a metric is a name.

The keys, with what holds where one is left out:

  name            the file's name
  description     shown by `--task list`
  kind            chat: questions with answers | text: plain text, to be predicted and gone on with
  format          auto, or a data format by name
  columns         our field name -> the data's column
  id              column with the row's own id; rows without one have their number, from 1 (default: id)
  group           columns of which the first that a row has groups rows into conversations (default: none, each its own)
  prompt          user, answer, system: the prompt template (default: the format's own)
  user_turns      column with a list of user turns that are asked one after the other; no references
  turns           last: the last answer of a conversation is asked for | each: every answer, after the true turns
  gold            the data's label -> the task's label
  read            how an answer is read: a rule, or a mapping with rule, after, labels, field
  metrics         names
  headline        the one metric that decides; null for none
  splits          name -> files (patterns, first match wins), labels, without, held_out, hub
  split           the split that is taken when none is named; without one all rows are. Of data that an adapter was
                  trained on, its run's own held-out rows are taken instead, and for a split with `held_out` too
  max_new_tokens  limit of an answer
  window, stride, bos            of kind text: see `continuation`
  num_windows     of kind text: only so many windows are scored, evenly spread (default: all)
  prompt_words, answer_words, num_prompts     of kind text: what is cut out to be gone on with
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.data.prompts import PromptTemplate, template_columns
from chulengo.errors import ChulengoError, ConfigError, nearest, yaml_fault
from chulengo.evaluate.answer_reading import RULES, Reading
from chulengo.evaluate.loss_metrics import LOSS_METRICS

if TYPE_CHECKING:
    import yaml

TASK_FILES = Path(__file__).parent / "task_files"
SPLIT_KEYS = ("files", "labels", "without", "held_out", "hub")
READ_KEYS = ("rule", "after", "labels", "field")
PROMPT_KEYS = ("system", "user", "answer")
CHOICES = {"kind": ("chat", "text"), "turns": ("last", "each"), "bos": ("window", "document", "none")}
_OF_TEXT = ("bits_per_byte",)


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows of a data set are meant.

    Attributes:
        files: patterns of file names in a data folder; the first that matches any file is taken; () for all files.
        labels: a JSON file {id: label} beside the data; its ids are the split, its labels the answers.
        without: a JSON file {id: …} beside the data; its ids are left out.
        held_out: this share of conversations, chosen as training splits off its validation rows; 0: all.
        hub: the split's name on the Hub.
    """

    files: tuple[str, ...] = ()
    labels: str = ""
    without: str = ""
    held_out: float = 0.0
    hub: str = "test"


@dataclass(frozen=True, slots=True)
class Task:
    """One task; the attributes are the keys that this file's top explains."""

    name: str
    description: str = ""
    kind: str = "chat"
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    id: str = "id"
    group: tuple[str, ...] = ()
    prompt: PromptTemplate | None = None
    user_turns: str = ""
    turns: str = "last"
    gold: Mapping[str, str] = field(default_factory=dict)
    read: Reading = field(default_factory=Reading)
    metrics: tuple[str, ...] = ()
    headline: str | None = None
    splits: Mapping[str, Split] = field(default_factory=dict)
    split: str = ""
    max_new_tokens: int = 256
    window: int = 512
    stride: int = 256
    bos: str = "window"
    num_windows: int = 0
    prompt_words: int = 64
    answer_words: int = 64
    num_prompts: int = 200

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, where answers are labels."""
        return tuple(self.read.labels)

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """The metrics of generated answers."""
        return tuple(name for name in self.metrics if name not in LOSS_METRICS)

    @property
    def loss_metrics(self) -> tuple[str, ...]:
        """The metrics that need the model itself."""
        return tuple(name for name in self.metrics if name in LOSS_METRICS)


def builtin_tasks() -> dict[str, Path]:
    """Returns the file of every built-in task, by name."""
    return {path.stem: path for path in sorted(TASK_FILES.glob("*.yaml"))}


def load_task(name_or_path: str) -> Task:
    """Returns a built-in task by name, or the task of a YAML file.

    Raises:
        ConfigError: there is no such task, or its file is not one; every problem of the file is named.
    """
    built_in = builtin_tasks()
    path = built_in.get(name_or_path)
    if path is None:
        path = Path(name_or_path).expanduser()
        if path.suffix.lower() not in (".yaml", ".yml"):
            close = nearest(name_or_path, built_in)
            raise ConfigError(
                f"There is no task '{name_or_path}'.", allowed=", ".join(built_in) + ", or a YAML file",
                next_step=f"--task {close}" if close else "chulengo score --task list",
            )
    content = _yaml(path)
    problems: list[str] = []
    task = _task(content, path.stem, problems)
    # of a file with unknown keys or broken values only what those cannot have caused
    problems += _metric_problems(task) if problems else _contradictions(task)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"The task {path} cannot be used:{listed}", next_step=f"mend {path}")
    return task


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ConfigError(
            f"The task {path} cannot be read: {error.strerror or error}.", allowed="a task's name, or a YAML file",
            next_step=f"--task {path.parent / close}" if close else "chulengo score --task list",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The task {path} is not valid YAML: {yaml_fault(error)}.",
                          next_step="mend that line") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The task {path} is not a mapping.", allowed=", ".join(Task.__dataclass_fields__),
                          next_step="copy a built-in task: chulengo score --task list shows their files")
    return {str(key): value for key, value in content.items()}


def _loader() -> type[yaml.SafeLoader]:
    """Returns the loader that refuses a key that stands twice, of which YAML's own takes the last without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            places = {self.construct_object(key): key.start_mark for key in reversed(keys)}
            for key in keys:
                name = self.construct_object(key)
                if key.start_mark.index != places[name].index:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{name}' stands twice, first in line {places[name].line + 1}",
                        key.start_mark,
                    )
            return super().construct_mapping(node, deep)

    return Loader


def _task(content: dict[str, Any], stem: str, problems: list[str]) -> Task:
    known = Task.__dataclass_fields__
    _unknown(content, known, "", problems)
    values: dict[str, Any] = {"name": stem}
    for key, value in content.items():
        if key in _NESTED and value is not None:
            values[key] = _NESTED[key](value, problems)
        elif key in known and value is not None:
            values[key] = _plain(key, value, problems)
    return Task(**values)


def _plain(key: str, value: Any, problems: list[str]) -> Any:
    """Returns the value of a key that is a text, a number, or a list or mapping of texts."""
    default = Task.__dataclass_fields__[key].default
    if key in ("metrics", "group"):
        return _texts(key, value, problems)
    if key in ("columns", "gold"):
        if isinstance(value, dict):
            return {str(name): str(other) for name, other in value.items()}
        problems.append(f"{key} must be a mapping")
        return {}
    if isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        problems.append(f"{key} is {value!r}, allowed: a whole number of 1 or more")
        return default
    if not isinstance(value, str):
        problems.append(f"{key} must be text, and is {value!r}")
        return default or ""
    if key in CHOICES and value not in CHOICES[key]:
        problems.append(f"{key} is '{value}', allowed: {', '.join(CHOICES[key])}")
    return value


def _texts(key: str, value: Any, problems: list[str]) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str | int) else value
    if not isinstance(listed, list) or not all(isinstance(each, str | int) for each in listed):
        problems.append(f"{key} must be a list of texts")
        return ()
    return tuple(str(each) for each in listed)


def _prompt(value: Any, problems: list[str]) -> PromptTemplate | None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values() if text is not None):
        problems.append("prompt must be a mapping of texts: user, answer, system")
        return None
    _unknown(value, PROMPT_KEYS, "prompt.", problems)
    missing = [key for key in ("user", "answer") if not value.get(key)]
    problems += [f"prompt.{key} is missing" for key in missing]
    for key in PROMPT_KEYS:
        try:
            template_columns(value.get(key) or "")
        except ChulengoError as error:
            problems.append(f"prompt.{key}: {error.given}")
    return None if missing else PromptTemplate("task", value.get("system"), value["user"], value["answer"])


def _read(value: Any, problems: list[str]) -> Reading:
    given = {"rule": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        problems.append("read must be a rule or a mapping")
        return Reading()
    _unknown(given, READ_KEYS, "read.", problems)
    rule = given.get("rule", "text")
    if rule not in RULES:
        close = nearest(str(rule), RULES)
        problems.append(f"read.rule is '{rule}', allowed: {', '.join(RULES)}"
                        + (f" (did you mean {close}?)" if close else ""))
        rule = "text"
    labels = given.get("labels") or {}
    if isinstance(labels, list):
        labels = {label: [] for label in labels}
    if not isinstance(labels, dict) or any(isinstance(name, bool) for name in labels):
        problems.append("read.labels must be a list of texts, or a mapping to lists; put yes and no in quotes")
        labels = {}
    ways = {str(label): _texts(f"read.labels.{label}", said or [], problems) for label, said in labels.items()}
    problems += _in_two_labels(ways)
    if rule == "label" and len(ways) < 2:
        problems.append("read.labels must name two labels or more")
    if rule == "json" and not given.get("field"):
        problems.append("read.field must name the field of the JSON object")
    return Reading(rule, str(given.get("after") or ""), ways, str(given.get("field") or ""))


def _in_two_labels(ways: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a problem for each word that two labels claim: the last would have it, whichever is meant."""
    owners: dict[str, str] = {}
    found = []
    for label, words in ways.items():
        for word in (label, *words):
            other = owners.setdefault(word.casefold(), label)
            if other != label:
                found.append(f"read.labels: '{word}' stands for two labels, '{other}' and '{label}'")
    return found


def _splits(value: Any, problems: list[str]) -> dict[str, Split]:
    if not isinstance(value, dict) or not all(isinstance(body, dict | None) for body in value.values()):
        problems.append("splits must be a mapping of mappings")
        return {}
    made = {}
    for name, body in value.items():
        given = body or {}
        _unknown(given, SPLIT_KEYS, f"splits.{name}.", problems)
        held_out = given.get("held_out", 0.0)
        if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 <= held_out < 1:
            problems.append(f"splits.{name}.held_out is {held_out!r}, allowed: 0 or more, below 1")
            held_out = 0.0
        files = _texts(f"splits.{name}.files", given.get("files") or [], problems)
        texts = {key: str(given.get(key) or "") for key in ("labels", "without")}
        made[str(name)] = Split(files, texts["labels"], texts["without"], float(held_out),
                                str(given.get("hub") or name))
    return made


_NESTED = {"prompt": _prompt, "read": _read, "splits": _splits}


def _unknown(given: Mapping[str, Any], known: Any, prefix: str, problems: list[str]) -> None:
    for key in given:
        if key not in known:
            close = nearest(str(key), known)
            problems.append(f"unknown key '{prefix}{key}'" + (f" (did you mean '{prefix}{close}'?)" if close else
                                                              f", allowed: {', '.join(known)}"))


def _contradictions(task: Task) -> list[str]:
    problems = [*_metric_problems(task)]
    if not task.metrics:
        problems.append("metrics is missing: name at least one")
    # where that metric is there, misspelt, it is one mistake
    misspelt = [name for name in task.metrics if not _is_metric(name, task.labels)]
    if task.headline is not None and task.headline not in task.metrics and not nearest(task.headline, misspelt):
        problems.append(f"headline is '{task.headline}', which is none of the metrics")
    if task.split and task.split not in task.splits:
        problems.append(f"split is '{task.split}', which is none of the splits ({', '.join(task.splits) or 'none'})")
    problems += [f"gold.{key} is '{label}', which is none of the labels ({', '.join(task.labels)})"
                 for key, label in task.gold.items() if label not in task.labels]
    if task.stride > task.window:
        problems.append(f"stride is {task.stride}, more than window ({task.window}): tokens would be left out")
    if task.user_turns and task.prompt is not None:
        problems.append("user_turns and prompt exclude each other")
    if task.user_turns and task.loss_metrics:
        problems.append(f"user_turns has no answers, so there is no {', '.join(task.loss_metrics)}")
    return problems


def _metric_problems(task: Task) -> list[str]:
    problems = []
    for name in task.metrics:
        if not _is_metric(name, task.labels):
            problems.append(_unknown_metric(name, task.labels))
        elif name in _OF_TEXT and task.kind != "text":
            problems.append(f"the metric '{name}' is for tasks of kind text")
    if len(set(task.metrics)) < len(task.metrics):
        problems.append("a metric is named twice")
    return problems


def _is_metric(name: str, labels: Sequence[str]) -> bool:
    from chulengo.evaluate.metrics.registry import check_name

    if name in LOSS_METRICS:
        return True
    try:
        check_name(name, labels)
    except ConfigError:
        return False
    return True


def _unknown_metric(name: str, labels: Sequence[str]) -> str:
    from chulengo.evaluate.metrics.registry import METRIC_NAMES, is_of_labels

    _, colon, label = name.partition(":")
    if colon and is_of_labels(name):
        there = f"there is no label '{label}', only {', '.join(labels)}" if labels else "read.labels names no labels"
        return f"unknown metric '{name}': {there}"
    known = (*METRIC_NAMES, *LOSS_METRICS)
    close = nearest(name, [each for each in known if "<" not in each])
    return f"unknown metric '{name}'" + (f" (did you mean '{close}'?)" if close else f", allowed: {', '.join(known)}")

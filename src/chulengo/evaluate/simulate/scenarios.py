"""What a simulated conversation is about: scenarios in YAML, checked before any model is loaded.

    client_stop: goodbye                  # optional: said by the client, it ends the conversation
    system: You run the help desk.        # optional: the agent's system prompt
    scenarios:
      - id: salt-mirror
        persona: A hiker with two children, in a hurry.
        goal: Find out what the Salt Mirror trek costs and when it starts.
        opening: Hello! What do we have to pay for Salt Mirror?
        met_when: {facts: ["165 soles", ["5:30", "half past five"]]}

`opening` is what the client says first: a text, or a list of texts for its first turns. Afterwards the client model
plays persona and goal; a scenario with neither is a script and ends with its last line. A held-out dialogue is such a
script (`dialogues`). `system` and `client_stop` may stand at the top, for all scenarios, or in one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chulengo.data.prompts import template_columns
from chulengo.errors import ConfigError, DataError, nearest, yaml_fault
from chulengo.evaluate.simulate.goals import Goal, read_goal

_KEYS = ("id", "persona", "goal", "opening", "met_when", "client_stop", "system")
_SHARED = ("system", "client_stop", "client_prompt", "client_cue")
_PROMPT_NAMES = ("persona", "goal", "stop")
_EXAMPLE = "scenarios: [{id: price, goal: …, opening: …, met_when: {facts: […]}}]"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to talk about.

    Attributes:
        id: unique in its file.
        source: where it came from, for error messages.
        persona: who the client is.
        goal: what the client wants.
        script: what the client says in its first turns.
        played: whether the client model goes on when the script has ended.
        met_when: when the goal is reached; None: when the client says `client_stop`, else the scenario has no goal.
        client_stop: a text of the client that ends the conversation.
        system: the agent's system prompt; None: the renderer's own.
        real_answers: what the real agent answered to the script, turn by turn.
        client_prompt: the client's system prompt, with {persona}, {goal} and {stop}; None: the default.
        client_cue: what opens the conversation for the client; None: the default.
    """

    id: str
    source: str
    persona: str | None = None
    goal: str | None = None
    script: tuple[str, ...] = ()
    played: bool = True
    met_when: Goal | None = None
    client_stop: str | None = None
    system: str | None = None
    real_answers: tuple[str, ...] = ()
    client_prompt: str | None = None
    client_cue: str | None = None

    @property
    def has_goal(self) -> bool:
        """Whether reaching a goal can be told."""
        return self.met_when is not None or self.client_stop is not None

    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits that change with anything in the scenario but its source."""
        content = {
            "id": self.id, "persona": self.persona, "goal": self.goal, "script": self.script, "played": self.played,
            "met_when": None if self.met_when is None else self.met_when.to_dict(), "client_stop": self.client_stop,
            "system": self.system, "real_answers": self.real_answers, "client_prompt": self.client_prompt,
            "client_cue": self.client_cue,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_scenarios(path: str | Path) -> list[Scenario]:
    """Returns the scenarios of a YAML file, in its order.

    Raises:
        DataError: no such file, or two scenarios with one id.
        ConfigError: broken YAML, an unknown key, a value of the wrong kind.
    """
    import yaml

    file = Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"The scenarios {path} cannot be read: {error.strerror or error}.", next_step=_nearest_file(file)
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = yaml_fault(error)
        raise ConfigError(f"The scenarios {path} are not valid YAML: {fault}.", next_step=_EXAMPLE) from error
    if isinstance(content, list):
        content = {"scenarios": content}
    if not isinstance(content, Mapping) or not isinstance(content.get("scenarios"), list) or not content["scenarios"]:
        raise ConfigError(f"{path} has no list of scenarios.", next_step=_EXAMPLE)
    _check_keys(content, ("scenarios", *_SHARED), str(path))
    shared = {key: _text(content, key, str(path)) for key in _SHARED}
    _check_prompt(shared["client_prompt"], str(path))
    found = [_scenario(item, number, str(path), shared) for number, item in enumerate(content["scenarios"], 1)]
    check_ids([scenario.id for scenario in found], str(path))
    return found


def with_defaults(scenarios: Sequence[Scenario], *, system: str | None) -> list[Scenario]:
    """Returns the scenarios with this system prompt of the agent where they have none of their own."""
    return [replace(each, system=system) if each.system is None else each for each in scenarios]


def check_ids(ids: Sequence[str], where: str) -> None:
    """Raises `DataError` when two conversations would have one id."""
    seen: set[str] = set()
    for each in ids:
        if each in seen:
            raise DataError(f"{where}: two conversations have the id {each!r}.", next_step="give each an id of its own")
        seen.add(each)


def _scenario(item: Any, number: int, path: str, shared: Mapping[str, str | None]) -> Scenario:
    where = f"{path}, scenario {number}"
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} is {type(item).__name__} {item!r:.60}.", next_step=_EXAMPLE)
    name = item.get("id", number)
    if not isinstance(name, str | int) or not str(name).strip():
        raise ConfigError(f"{where}: its id is {name!r:.60}.", allowed="a text or a whole number",
                          next_step="id: late-parcel")
    where = f"{path}, scenario {str(name)!r}"
    _check_keys(item, _KEYS, where)
    persona, goal = _text(item, "persona", where), _text(item, "goal", where)
    script = _opening(item.get("opening"), where)
    if not (persona or goal or script):
        raise ConfigError(f"{where} says nothing of the client.", allowed="persona, goal or opening",
                          next_step="goal: Find out …")
    return Scenario(
        id=str(name), source=where, persona=persona, goal=goal, script=script, played=bool(persona or goal),
        met_when=None if item.get("met_when") is None else read_goal(item["met_when"], where),
        client_stop=_text(item, "client_stop", where) or shared["client_stop"],
        system=_text(item, "system", where) or shared["system"],
        client_prompt=shared["client_prompt"], client_cue=shared["client_cue"],
    )


def _opening(given: Any, where: str) -> tuple[str, ...]:
    lines = given if isinstance(given, list) else [] if given is None else [given]
    for line in lines:
        if not isinstance(line, str) or not line.strip():
            raise ConfigError(f"{where}: opening is {line!r:.60}.", allowed="a text, or a list of texts",
                              next_step="opening: Hello, I have a question.")
    return tuple(line.strip() for line in lines)


def _text(given: Mapping[str, Any], key: str, where: str) -> str | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {key} is {value!r:.60}.", allowed="a text that is not empty",
                          next_step=f'{key}: "…"')
    return value.strip()


def _check_prompt(prompt: str | None, where: str) -> None:
    for name in template_columns(prompt or ""):
        if name not in _PROMPT_NAMES:
            raise ConfigError(f"{where}: client_prompt names {{{name}}}.", allowed=", ".join(_PROMPT_NAMES),
                              next_step=f"write {{{nearest(name, _PROMPT_NAMES) or 'goal'}}}, or {{{{ for a brace")


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            close = nearest(str(key), known)
            raise ConfigError(f"{where} has the unknown key '{key}'.", allowed=", ".join(known),
                              next_step=f"{close}: …" if close else "take it out")


def _nearest_file(path: Path) -> str:
    siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    return f"--scenarios {path.parent / close}" if close else f"ls {path.parent}"

"""A client and an agent talk: scenarios or held-out dialogues, transcripts and scores.

  chulengo simulate --adapter runs/agent --scenarios scenarios.yaml --out talks
  chulengo simulate --adapter runs/agent --client runs/client --scenarios scenarios.yaml --repeats 5 --out talks
  chulengo simulate --adapter runs/agent --replay dialogues.csv --num-rows 50 --out talks
  chulengo simulate --replay train.csv --write-chats data     the same dialogues as training data, for either side

The agent is the tuned model. The client is the base without the adapter, unless --client names another adapter of the
same base. --replay says a real customer's turns again and compares the answers with the real agent's. --out is a
folder: transcripts.jsonl, transcripts.html, results.json; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chulengo.cli.inference import (
    add_model_arguments,
    add_sampling_arguments,
    add_session_arguments,
    memory_explained,
    session_config,
    session_from,
    settings_from,
)
from chulengo.data.wording import counted
from chulengo.errors import ConfigError

if TYPE_CHECKING:
    from chulengo.config import RunConfig
    from chulengo.evaluate.results import Score
    from chulengo.evaluate.simulate.scenarios import Scenario
    from chulengo.evaluate.simulate.speakers import Voice
    from chulengo.evaluate.simulate.talk import Conversation
    from chulengo.evaluate.simulate.transcripts import TranscriptFile
    from chulengo.generate.settings import GenerationSettings
    from chulengo.model.session import Session

POOL_BATCHES = 8  # batches of conversations that are held at a time: adapters are switched once for so many
NOTE_SECONDS = 5.0
COUNTS = {"turns": "--turns", "repeats": "--repeats", "batch_size": "--batch-size", "num_rows": "--num-rows",
          "replay_turns": "--replay-turns"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `chulengo simulate`."""
    add_model_arguments(parser)
    add_session_arguments(parser)
    parser.add_argument("--scenarios", metavar="FILE", help="YAML: persona, goal, when it is met, opening words")
    parser.add_argument("--replay", metavar="DATA", help="dialogues whose customer's turns are said again")
    parser.add_argument("--replay-turns", type=int, metavar="N",
                        help="say only the customer's first N turns; the client model goes on")
    parser.add_argument("--num-rows", type=int, metavar="N", help="a random subset of this many dialogues (data.seed)")
    parser.add_argument("--client", default="base", metavar="WHO",
                        help="base (without adapter), agent (the agent's model), or an adapter (default: base)")
    parser.add_argument("--system", metavar="TEXT", help="the agent's system prompt, where there is no other")
    parser.add_argument("--turns", type=int, default=8, metavar="N", help="most answers of the agent (default: 8)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N",
                        help="conversations a scenario, each with other random numbers (default: 1)")
    parser.add_argument("--out", metavar="DIR", help="transcripts and scores; goes on with a folder that is there")
    parser.add_argument("--write-chats", metavar="DIR",
                        help="write the dialogues of --replay as training data (agent.jsonl, client.jsonl), and stop")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="conversations at a time (default: 8)")
    add_sampling_arguments(parser, max_new_tokens=128, temperature=0.7, top_p=0.9)
    parser.add_argument("--client-temperature", type=float, metavar="N", help="the client's (default: the agent's)")


def run(arguments: argparse.Namespace) -> int:
    """Runs `chulengo simulate`; returns 0."""
    _check(arguments)
    config = session_config(arguments)
    scenarios = _scenarios(arguments, config)
    if arguments.write_chats:
        return _write_chats(scenarios, Path(arguments.write_chats))
    from dataclasses import replace

    from chulengo.evaluate.simulate.scenarios import check_ids
    from chulengo.evaluate.simulate.speakers import AGENT, BASE, agent_and_client
    from chulengo.evaluate.simulate.talk import conversations
    from chulengo.evaluate.simulate.transcripts import TranscriptFile
    from chulengo.model.session import adapter_folder

    settings = settings_from(arguments)
    heat = settings.temperature if arguments.client_temperature is None else arguments.client_temperature
    client_settings = replace(settings, temperature=heat)
    if arguments.repeats > 1 and settings.temperature == heat == 0:
        raise ConfigError("--repeats of greedy speakers would be the same conversation again and again.",
                          next_step="--temperature 0.7 or --client-temperature 0.7")
    asked = conversations(scenarios, arguments.repeats)
    check_ids([each.id for each in asked], arguments.scenarios or arguments.replay)
    if arguments.client not in (BASE, AGENT):
        adapter_folder(arguments.client, "--client")  # shows before minutes of loading
    session = session_from(arguments, config, adds_adapter=arguments.client not in (BASE, AGENT))
    agent, client = agent_and_client(session, arguments.client)
    for note in client.notes:
        print(f"note: {note}", file=sys.stderr)
    made_with = _made_with(session, agent, client, settings, client_settings, arguments)
    folder = Path(arguments.out)
    file = TranscriptFile(folder, made_with, asked)
    started = time.perf_counter()
    with memory_explained(f"--batch-size {max(1, arguments.batch_size // 2)}"):
        _talk(file, agent, client, settings, client_settings, arguments)
    _report(folder, file.in_order(), made_with, arguments, seconds=time.perf_counter() - started)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.scenarios is None) == (arguments.replay is None):
        both = arguments.replay is not None
        given = "Both --scenarios and --replay are given." if both else "Neither --scenarios nor --replay is given."
        raise ConfigError(given, allowed="one of them", next_step="--scenarios scenarios.yaml")
    if arguments.replay is None:
        for name in ("replay_turns", "num_rows", "write_chats"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} belongs to --replay.", next_step="--replay DATA")
    for name, option in COUNTS.items():
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}.", allowed="1 or more", next_step=f"{option} 1")
    if arguments.out is None and not arguments.write_chats:
        raise ConfigError("No folder for the transcripts is given.", next_step="--out talks")
    if arguments.out is not None and Path(arguments.out).is_file():
        raise ConfigError(f"--out {arguments.out} is a file.", allowed="a folder", next_step="--out talks")
    if arguments.replay is not None and arguments.replay_turns is None and arguments.client != "base":
        raise ConfigError(
            f"--client {arguments.client} would never speak: --replay says all of the customer's turns.",
            next_step="--replay-turns 1   (the customer's first turn, then the client goes on)",
        )


def _scenarios(arguments: argparse.Namespace, config: RunConfig) -> list[Scenario]:
    from chulengo.evaluate.simulate.scenarios import load_scenarios, with_defaults

    if arguments.scenarios is not None:
        found = load_scenarios(arguments.scenarios)
    else:
        from chulengo.data.prompts import load_template
        from chulengo.evaluate.simulate.dialogues import load_dialogues
        from chulengo.train.inputs import EMBEDDED_DATA

        data, name = config.data, arguments.replay
        source = str(EMBEDDED_DATA[name]()) if name in EMBEDDED_DATA else name
        found = load_dialogues(
            source, format_name=data.format, columns=data.columns,
            template=load_template(config.prompt.template) if config.prompt.template else None,
            cleaning=data.cleaning, hub_split=data.hub_split, offline=config.model.offline,
            num_rows=arguments.num_rows, seed=data.seed, replay_turns=arguments.replay_turns,
        )
    return with_defaults(found, system=arguments.system)


def _write_chats(scenarios: list[Scenario], folder: Path) -> int:
    from chulengo.data.selection import write_examples
    from chulengo.data.types import Example
    from chulengo.evaluate.simulate.client import agent_chat, client_chat

    for name, chat in (("agent", agent_chat), ("client", client_chat)):
        file = folder / f"{name}.jsonl"
        if file.exists():
            raise ConfigError(f"{file} is there already.", next_step="--write-chats with another folder")
        written = write_examples(file, (Example(chat(each), each.source) for each in scenarios))
        print(f"{file}: {counted(written, 'conversation')}", file=sys.stderr)
    return 0


def _made_with(
    session: Session, agent: Voice, client: Voice, settings: GenerationSettings, client_settings: GenerationSettings,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """What decides every word; a folder with another value here holds other conversations."""
    from chulengo.evaluate.simulate.client import CLIENT_CUE, CLIENT_PROMPT

    return {
        "model": session.model_name, "quantization": session.quantization, "agent": _side(agent),
        "client": {"who": arguments.client, **_side(client)}, "agent_settings": settings.to_dict(),
        "client_settings": client_settings.to_dict(), "turns": arguments.turns,
        "client_prompt": CLIENT_PROMPT, "client_cue": CLIENT_CUE,
    }


def _side(voice: Voice) -> dict[str, Any]:
    from chulengo.model.adapter_hash import adapter_hash

    return {
        "adapter": None if voice.adapter is None else str(voice.adapter), "weights": adapter_hash(voice.adapter),
        "renderer": voice.renderer.fingerprint(),
    }


def _talk(
    file: TranscriptFile, agent: Voice, client: Voice, settings: GenerationSettings,
    client_settings: GenerationSettings, arguments: argparse.Namespace,
) -> None:
    from chulengo.evaluate.simulate.talk import talk

    left = file.left
    total = len(left) + len(file.finished)
    if file.finished and left:
        print(f"{file.path}: {len(file.finished)} of {total} conversations are there, going on", file=sys.stderr)
    size, noted = arguments.batch_size, time.monotonic()
    for conversation in talk(
        left, client.speaker(client_settings, size), agent.speaker(settings, size), max_turns=arguments.turns,
        seed=settings.seed, pool_size=size * POOL_BATCHES,
    ):
        file.append(conversation)
        if time.monotonic() - noted > NOTE_SECONDS or len(file.finished) == total:
            noted = time.monotonic()
            print(f"{file.path}: {len(file.finished)} of {total}", file=sys.stderr)


def _report(
    folder: Path, talks: list[Conversation], made_with: dict[str, Any], arguments: argparse.Namespace, *, seconds: float
) -> None:
    from chulengo.evaluate.results import RESULTS_FILE, write_results
    from chulengo.evaluate.simulate.page import transcripts_page
    from chulengo.evaluate.simulate.scores import endings, missing_overlap, simulation_scores
    from chulengo.evaluate.simulate.stored import results_of
    from chulengo.evaluate.simulate.transcripts import replace_file
    from chulengo.train.manifest import masked

    scores = simulation_scores(talks, max_turns=arguments.turns)
    for name in missing_overlap(scores):
        print(f"note: {name} is not computed: pip install 'chulengo[eval]'", file=sys.stderr)
    results = results_of(talks, scores, made_with, source=arguments.scenarios or arguments.replay, seconds=seconds,
                         command=masked(arguments.command))
    write_results(folder / RESULTS_FILE, results)
    title = f"Simulation: {Path(arguments.scenarios or arguments.replay).name}"
    page = transcripts_page(talks, scores, _facts(made_with, arguments), title=title)
    replace_file(folder / "transcripts.html", page)
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
        return
    _table(scores)
    print("; ".join(f"{name} {count}" for name, count in endings(talks).items()))
    print(f"transcripts and scores are in {folder}: open {folder / 'transcripts.html'}", file=sys.stderr)


def _facts(made_with: dict[str, Any], arguments: argparse.Namespace) -> dict[str, str]:
    from chulengo.generate.settings import GenerationSettings

    agent, client = made_with["agent"], made_with["client"]
    speaks = {"base": "the base without adapter", "agent": "the agent's model"}.get(client["who"], client["adapter"])
    client_words = GenerationSettings(**made_with["client_settings"]).describe()
    scripted = arguments.replay is not None and arguments.replay_turns is None
    return {
        "Model": f"{made_with['model']} ({made_with['quantization']})",
        "Agent": agent["adapter"] or "the base itself",
        "Client": "a real customer's turns" if scripted else speaks,
        "Agent's words": GenerationSettings(**made_with["agent_settings"]).describe(),
        **({} if scripted else {"Client's words": client_words}),
        "Turns": f"at most {made_with['turns']}",
    }


def _table(scores: list[Score]) -> None:
    from chulengo.evaluate.simulate.page import shown_interval, shown_value

    rows = [("score", "value", "95 % interval", "n")]
    rows += [(each.name, shown_value(each), shown_interval(each), str(each.num_items)) for each in scores]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

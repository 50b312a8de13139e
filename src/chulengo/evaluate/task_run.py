"""A model's own part of a task: its losses and its answers, kept on disk as they come, with the time each took.

Answers are generated in batches of similar length, longest first. The batches are a function of the items alone, not
of what is left to do: an evaluation that was interrupted and goes on runs the same batches as one that was not, so
both give the same answers to the last bit. Only a batch that was torn in the middle of being written is run smaller,
and one that is too large for the memory there is goes in parts (`model.cache_room`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chulengo.data.batches import pad_token
from chulengo.data.ledger import PART, check, settle
from chulengo.data.types import Message
from chulengo.errors import RenderError
from chulengo.evaluate.continuation import (
    Windowing,
    text_counts,
    text_metrics,
    window_losses,
    windowing_for,
    windows_of,
)
from chulengo.evaluate.loss_metrics import next_token_metric, perplexity_metric
from chulengo.evaluate.metrics.metric import Counts, Metric
from chulengo.evaluate.perplexity import DEFINITION, VERSION, Losses, row_losses
from chulengo.evaluate.predictions import RowsFile
from chulengo.evaluate.task_data import TaskData
from chulengo.evaluate.task_items import FEWEST_DOCUMENTS, Item
from chulengo.evaluate.tasks import Task
from chulengo.generate.engine import Prompt, chat_prompt, complete_all, raw_prompt
from chulengo.generate.settings import GenerationSettings, item_seed
from chulengo.train.whole_files import sha256_of

if TYPE_CHECKING:
    from chulengo.model.session import Session

NEXT_TOKEN = "Share of supervised tokens (see perplexity) that were the model's likeliest one."
UNLIMITED = 1 << 30  # tokens: the limit of a model that has none
SECONDS_FILE = "seconds.json"
OF_MODEL = ("engine", "losses")  # parts in which the model runs
REPORT_SECONDS = 10.0  # between two lines about progress


@dataclass(frozen=True, slots=True)
class Overlong:
    """What happens to rows over the model's context when their loss is asked for; see `data.ledger.settle`."""

    max_seq_tokens: int | None = None
    policy: str = "error"
    allow_cut_end_of_turn: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """The metrics of the loss, ready to be scored: names, groups and counts of what they are taken over."""

    metrics: list[Metric]
    ids: list[str]
    groups: list[str]
    counts: list[Counts]


class Seconds:
    """Adds up where the time goes, over all runs of an evaluation: its cost is not what the last of them took."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.before = 0.0  # all that earlier runs took
        self._file: Path | None = None
        self._started = time.perf_counter()

    def go_on(self, results: Path) -> None:
        """Adds what earlier runs of the evaluation took, and keeps the sum beside its results from now on.

        Args:
            results: the results file. One that was written without the sum says itself what it took.
        """
        self._file = results.with_name(SECONDS_FILE)
        earlier = _read_seconds(self._file) or _read_seconds(results)
        self.before = earlier.pop("total", 0.0)
        for name, seconds in earlier.items():
            self.parts[name] = self.parts.get(name, 0.0) + seconds

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started
            if name in OF_MODEL:  # not before: what else is there may be another evaluation's, and refused
                self._keep()

    def now(self) -> float:
        """Returns the seconds of this run."""
        return time.perf_counter() - self._started

    def summary(self) -> dict[str, float | None]:
        """Returns all parts, the total, and the harness: all that is neither loading the model nor running it.

        `harness_share` is the harness over the time without loading the model; None where the model did not run.
        """
        total = self._keep()
        ours = total - self.parts.get("load_model", 0.0)
        run = sum(self.parts.get(name, 0.0) for name in OF_MODEL)
        share = (ours - run) / ours if run > 0 else None
        return {**self.parts, "total": total, "harness": ours - run, "harness_share": share}

    def _keep(self) -> float:
        total = self.before + self.now()
        if self._file is not None and self._file.parent.is_dir():
            unfinished = self._file.with_name(self._file.name + ".unfinished")
            with contextlib.suppress(OSError):  # a full disk stops the evaluation where its answers are written
                unfinished.write_text(json.dumps({**self.parts, "total": total}) + "\n", encoding="utf-8")
                os.replace(unfinished, self._file)
        return total


def _read_seconds(file: Path) -> dict[str, float]:
    """Returns the parts in a file of seconds, or of results; {} where there are none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = content.get("seconds", content) if isinstance(content, dict) else {}
    derived = ("harness", "harness_share")
    return {name: float(value) for name, value in found.items()
            if isinstance(value, int | float) and name not in derived}


def model_settings(session: Session, side: str) -> dict[str, Any]:
    """Returns what decides a side's losses and, with the generation's settings, its answers; JSON-able."""
    adapter = session.adapter if side == "tuned" else None
    weights = None if adapter is None else sha256_of(adapter / "adapter_model.safetensors")
    return {
        "model": session.model_name, "adapter": weights, "quantization": session.quantization,
        "dtype": str(session.model.dtype).removeprefix("torch."), "renderer": session.renderer.fingerprint(),
    }


def prompts_hash(items: Sequence[Item]) -> str:
    """Returns a hash of the ids and the prompts."""
    digest = hashlib.sha256()
    for item in items:
        parts = [item.id, *(text for m in item.messages for text in (m.role, m.content))]
        digest.update("\x1f".join(parts).encode("utf-8", "surrogatepass") + b"\x1e")
    return digest.hexdigest()


def generate_answers(
    session: Session, side: str, task: Task, items: Sequence[Item], settings: GenerationSettings, *, batch_size: int,
    file: RowsFile | None, seconds: Seconds,
) -> list[dict[str, Any]]:
    """Returns a row with `answer` and `finish_reason` for every item, in order; those in the file are not made again.

    Args:
        session: base and adapter.
        side: base or tuned.
        task: says whether prompts are conversations or plain text.
        items: with their messages.
        settings: how tokens are chosen.
        batch_size: prompts at a time.
        file: where finished answers are and go; None: nowhere.
        seconds: the engine's time is added under `engine`.
    """
    done: dict[str, dict[str, Any]] = {} if file is None else file.rows
    if any(item.id in done for item in items):
        there = sum(item.id in done for item in items)
        _say(f"answers, {side}: {there} of {len(items)} are there, going on")
    index = {item.id: number for number, item in enumerate(items)}
    say = _progress(f"answers, {side}", len(items))
    with session.side(side) as model:
        for asked_before in sorted({item.asked_before for item in items}):
            turn = [item for item in items if item.asked_before == asked_before]
            prompts = {item.id: _prompt(session, task, item, _asked(item, done)) for item in turn}
            turn.sort(key=lambda item: (-len(prompts[item.id].ids), index[item.id]))
            for start in range(0, len(turn), batch_size):
                batch = [item for item in turn[start : start + batch_size] if item.id not in done]
                if not batch:
                    continue
                seeds = [item_seed(settings.seed, index[item.id]) for item in batch]
                asked = [prompts[item.id] for item in batch]
                with seconds.measure("engine"):
                    answers = complete_all(model, asked, settings, batch_size, seeds)
                rows: list[dict[str, Any]] = [
                    {"id": item.id, "answer": answer.text, "finish_reason": answer.finish_reason,
                     "num_tokens": len(answer.ids), "num_prompt_tokens": answer.num_prompt_tokens,
                     "seed": answer.seed, "seconds": round(answer.seconds, 4)}
                    for item, answer in zip(batch, answers, strict=True)
                ]
                if file is None:
                    done.update((row["id"], row) for row in rows)
                else:
                    file.add(rows)
                say(sum(item.id in done for item in items))
    return [done[item.id] for item in items]


def _asked(item: Item, done: Mapping[str, Mapping[str, Any]]) -> tuple[Message, ...]:
    """Returns the messages of an item, the model's own earlier answers put between the user's turns."""
    if not item.asked_before:
        return item.messages
    stem = item.id.rpartition("/")[0]
    turns: list[Message] = []
    for number, message in enumerate(item.messages, 1):
        turns.append(message)
        if number < len(item.messages):
            turns.append(Message("assistant", done[f"{stem}/{number}"]["answer"]))
    return tuple(turns)


def _prompt(session: Session, task: Task, item: Item, messages: tuple[Message, ...]) -> Prompt:
    if task.kind == "text":
        return raw_prompt(session.tokenizer, messages[0].content, encoder_decoder=session.encoder_decoder)
    try:
        return chat_prompt(session.renderer, messages)
    except RenderError as error:
        raise RenderError(f"Item {item.id}: {error.given}", allowed=error.allowed, next_step=error.next_step) from error


def count_losses(
    session: Session, side: str, task: Task, data: TaskData, *, batch_size: int, overlong: Overlong,
    file: RowsFile | None, seconds: Seconds,
) -> Counted:
    """Returns what the task's metrics of the loss count on one side.

    Args:
        session: base and adapter.
        side: base or tuned.
        task: names the metrics.
        data: with talks.
        batch_size: rows at a time.
        overlong: what happens to rows over the model's context.
        file: where losses are and go; None: nowhere. They are written once all are there.
        seconds: the model's time is added under `losses`.
    """
    if task.kind == "text":
        return _count_text(session, side, task, data, batch_size=batch_size, file=file, seconds=seconds)
    limit = overlong.max_seq_tokens or session.context or UNLIMITED
    rows, ledger = settle(
        [session.renderer.render(talk.example) for talk in data.talks], max_seq_tokens=limit,
        overlong=overlong.policy, allow_cut_end_of_turn=overlong.allow_cut_end_of_turn,
    )
    check(ledger)
    place = {talk.example.source: number for number, talk in enumerate(data.talks)}
    owners = [place[row.source.split(PART)[0]] for row in rows]
    left_out = len(data.talks) - len(set(owners))
    if left_out:
        _say(f"note: {left_out} of {len(data.talks)} rows are too long for the loss and left out "
             f"(training.overlong={overlong.policy})")
    say = _progress(f"losses, {side}", len(rows))

    def run() -> Losses:
        with session.side(side) as model, seconds.measure("losses"):
            return row_losses(model, rows, pad_id=_pad(session), batch_size=batch_size, on_rows=say)

    losses = _kept(file, [row.source for row in rows], run)
    kept = sorted(set(owners))
    counts = np.zeros((len(data.talks), 3))
    for column, values in enumerate((losses.nll, losses.targets, losses.hits)):
        counts[:, column] = np.bincount(owners, values, len(data.talks))
    counts = counts[kept]
    makers = {
        "perplexity": (perplexity_metric(VERSION, DEFINITION), counts[:, :2]),
        "next_token_accuracy": (next_token_metric("next-token/1", NEXT_TOKEN), counts[:, [2, 1]]),
    }
    chosen = [makers[name] for name in task.loss_metrics]
    return Counted([m for m, _ in chosen], [data.talks[i].id for i in kept], [data.talks[i].group for i in kept],
                   [c for _, c in chosen])


def _count_text(
    session: Session, side: str, task: Task, data: TaskData, *, batch_size: int, file: RowsFile | None,
    seconds: Seconds,
) -> Counted:
    windowing, notes = windowing_for(
        session.tokenizer, Windowing(task.window, task.stride, task.bos), session.context
    )
    for note in notes:
        _say(f"note: {note}")
    windows = windows_of(
        session.tokenizer, [(talk.id, talk.group, talk.example.messages[0].content) for talk in data.talks], windowing
    )
    if task.num_windows and len(windows) > task.num_windows:
        windows = [windows[place * len(windows) // task.num_windows] for place in range(task.num_windows)]
        windowing = replace(windowing, num_windows=task.num_windows)
    say = _progress(f"losses, {side}", len(windows))

    def run() -> Losses:
        with session.side(side) as model, seconds.measure("losses"):
            return window_losses(model, windows, pad_id=_pad(session), batch_size=batch_size, on_rows=say)

    losses = _kept(file, [window.id for window in windows], run)
    metrics, counts = text_metrics(windowing), text_counts(losses, windows)
    by_text = len(data.talks) >= FEWEST_DOCUMENTS
    return Counted(
        [metrics[name] for name in task.loss_metrics], [window.id for window in windows],
        [window.group if by_text else window.id for window in windows], [counts[name] for name in task.loss_metrics],
    )


def _kept(file: RowsFile | None, names: Sequence[str], run: Callable[[], Losses]) -> Losses:
    """Returns the losses that the file has, or else runs and keeps them."""
    # a row's name may occur twice only where rows were split by hand; numbers are always different
    keys = [f"{number}:{name}" for number, name in enumerate(names)]
    if file is not None and keys and all(key in file.rows for key in keys):
        found = [file.rows[key] for key in keys]
        return Losses(
            np.array([row["nll"] for row in found], np.float64), np.array([row["targets"] for row in found], np.int64),
            np.array([row["hits"] for row in found], np.int64),
        )
    losses = run()
    if file is not None:
        file.add(
            {"id": key, "nll": float(losses.nll[i]), "targets": int(losses.targets[i]), "hits": int(losses.hits[i])}
            for i, key in enumerate(keys)
        )
    return losses


def _pad(session: Session) -> int:
    return pad_token(session.tokenizer.pad_id, session.tokenizer.eos_id)


def _progress(what: str, total: int) -> Callable[[int], None]:
    """Returns a function that says how many are done, at most every few seconds and at the end."""
    last = time.monotonic()

    def say(done: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            _say(f"{what}: {done} of {total}")

    return say


def _say(text: str) -> None:
    print(text, file=sys.stderr)

"""Rows that hold their conversation as a list of turns: messages, ShareGPT, preference pairs, KTO.

One reader takes both spellings of a turn, `role`/`content` and `from`/`value`, and the usual names of the three
speakers. Turns of tools and functions are refused: no chat style here renders them, and leaving them out would train
the assistant on answers whose grounds the model never saw. Images likewise.

A preference pair is a prompt and two single answers. Where a row holds two whole conversations, the prompt is what
they have in common at the start, and only one assistant turn may differ after it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from chulengo.data.format_definition import Fields, Format, column, value
from chulengo.data.formats_text import hh_turns, is_hh
from chulengo.data.prompts import as_text
from chulengo.data.types import Example, Kind, Message, Role
from chulengo.errors import DataError

CONVERSATION = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
PROMPT = ("prompt", "question", "instruction", "input", "query")
COMPLETION = ("completion", "response", "output", "answer")
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
    "text": "text",
}  # fmt: skip
_TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "tool_call", "ipython"}


def turns(cell: Any) -> tuple[Message, ...]:
    """Returns the messages of one cell: a list of turns, one turn, or JSON text of these.

    Raises:
        DataError: something in it is not a turn of text by a known speaker.
    """
    items = _list(cell)
    if items is None:
        raise DataError(f"a conversation must be a list of turns, not {type(cell).__name__}")
    return tuple(_turn(item, place) for place, item in enumerate(items, start=1))


def _list(cell: Any) -> list[Any] | None:
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if isinstance(cell, dict):
        return [cell]
    return cell if isinstance(cell, list) else None


def _turn(item: Any, place: int) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"turn {place} is {type(item).__name__}, not an object with role and content")
    name = item.get("role", item.get("from"))
    if name is None:
        raise DataError(f"turn {place} has no role (its keys: {', '.join(map(str, item))})")
    role = _ROLES.get(str(name).strip().lower())
    if str(name).strip().lower() in _TOOL_ROLES or item.get("tool_calls") or item.get("function_call"):
        raise DataError(f"turn {place} is a tool call or a tool's answer (role '{name}'), which no chat style renders")
    if role is None:
        raise DataError(f"turn {place} has the unknown role '{name}'", allowed=", ".join(_ROLES))
    content = _content(item.get("content", item.get("value")), place)
    return Message(role, content, _trained(item))


def _content(content: Any, place: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"turn {place}: its content is {type(content).__name__}, not text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"turn {place} has a part of type '{kind}'; only text parts can be rendered")
    return "".join(texts)


def _trained(item: dict[str, Any]) -> bool | None:
    if isinstance(item.get("trained"), bool):
        return bool(item["trained"])
    weight = item.get("weight")  # OpenAI's name: 0 or 1
    return None if weight is None else bool(weight)


def _has_keys(cell: Any, *keys: str) -> bool:
    first = next(iter(_list(cell) or []), None)
    return isinstance(first, dict) and all(key in first for key in keys)


def _conversation(fields: Fields) -> tuple[Message, ...]:
    messages = turns(value(fields, CONVERSATION))
    return _with_system(fields, messages)


def _with_system(fields: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    # some sets keep the system prompt in a column beside the turns
    system = as_text(value(fields, SYSTEM), "system")
    if not system.strip() or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", system), *messages)


def read_messages(fields: Fields, source: str) -> Example:
    """Returns the example of a row of turns; also of rows that `selection.write_examples` wrote."""
    if column(fields, CONVERSATION) is None:
        messages = turns(_given(fields, "prompt", CONVERSATION[0])) + turns(_given(fields, "completion"))
        return Example(_with_system(fields, messages), source)
    kind, group = fields.get("kind", "chat"), fields.get("split_group")
    desirable, references, rejected = fields.get("desirable"), fields.get("references"), fields.get("rejected")
    messages = _conversation(fields)
    if kind not in get_args(Kind):  # a column `kind` of the data's own
        kind = "chat"
    return Example(
        messages=messages,
        source=source,
        kind=kind,
        rejected=turns(rejected) if kind == "preference" and rejected else (),
        desirable=desirable if isinstance(desirable, bool) else None,
        references=tuple(map(str, references)) if isinstance(references, list) else (),
        group=group if isinstance(group, str) else "",
    )


def read_preference(fields: Fields, source: str) -> Example:
    """Returns the pair of a row with `chosen` and `rejected`.

    Raises:
        DataError: the two differ in more than one assistant turn.
    """
    prompt = _prompt(fields)
    chosen = _answer_turns(_given(fields, "chosen"), "chosen")
    rejected = _answer_turns(_given(fields, "rejected"), "rejected")
    spoken = tuple(message for message in prompt if message.role != "system")
    if not prompt:
        common = _common(chosen[:-1], rejected[:-1])
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    else:
        for skipped in (prompt, spoken):
            if skipped and len(chosen) > 1 and chosen[: len(skipped)] == skipped == rejected[: len(skipped)]:
                chosen, rejected = chosen[len(skipped) :], rejected[len(skipped) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [message.role for message in answer] != ["assistant"]:
            roles = ", ".join(message.role for message in answer) or "nothing"
            raise DataError(f"'{name}' must add one assistant turn to what both share; it adds: {roles}")
    messages = _with_system(fields, prompt + chosen)
    return Example(messages, source, kind="preference", rejected=rejected)


def _given(fields: Fields, name: str, called: str | None = None) -> Any:
    if name not in fields:
        raise DataError(f"the row has no column '{called or name}' (it has: {', '.join(map(str, fields))})")
    return fields[name]


def _prompt(fields: Fields) -> tuple[Message, ...]:
    if column(fields, CONVERSATION) is not None:
        return turns(value(fields, CONVERSATION))
    cell = value(fields, PROMPT)
    if cell is None:
        return ()
    if column(fields, PROMPT) == "instruction" and isinstance(cell, str) and fields.get("input"):
        cell = f"{cell}\n\n{as_text(fields['input'], 'input')}"
    if is_hh(cell):
        messages = hh_turns(cell)
        return messages[:-1] if messages[-1].role == "assistant" and not messages[-1].content else messages
    return (Message("user", cell),) if isinstance(cell, str) else turns(cell)


def _answer_turns(cell: Any, name: str) -> tuple[Message, ...]:
    if cell is None:
        return (Message("assistant", ""),)
    if is_hh(cell):
        return hh_turns(cell)
    if isinstance(cell, str):
        return (Message("assistant", cell),)
    if not isinstance(cell, list | dict):
        raise DataError(f"column '{name}' holds {type(cell).__name__}, not an answer")
    return turns(cell)


def _common(first: Sequence[Message], second: Sequence[Message]) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def read_kto(fields: Fields, source: str) -> Example:
    """Returns the example of a row with a conversation (or prompt and completion) and a true/false label."""
    label = _truth(value(fields, ("label",)))
    if label is None:
        raise DataError("column 'label' is neither true nor false")
    if column(fields, CONVERSATION) is not None:
        messages = _conversation(fields)
    else:
        messages = _with_system(fields, _prompt(fields) + _answer_turns(value(fields, COMPLETION), "completion"))
    return Example(messages, source, kind="kto", desirable=label)


def _truth(label: Any) -> bool | None:
    if isinstance(label, bool):
        return label
    return {"true": True, "false": False}.get(label.strip().lower()) if isinstance(label, str) else None


def _is_kto(fields: Fields) -> bool:
    if _truth(value(fields, ("label",))) is None:
        return False
    return column(fields, CONVERSATION) is not None or (
        column(fields, PROMPT) is not None and column(fields, COMPLETION) is not None
    )


def _is_messages(fields: Fields) -> bool:
    if _has_keys(value(fields, CONVERSATION), "role"):
        return True
    return _has_keys(fields.get("prompt"), "role") and _has_keys(fields.get("completion"), "role")


def _sharegpt(fields: Fields, source: str) -> Example:
    return replace(read_messages(fields, source), kind="chat", rejected=(), desirable=None)


def read_mt_bench(fields: Fields, source: str) -> Example:
    """Returns the questions of an MT-Bench row, each with its reference answer where the row has them.

    Without references it is the questions alone, one after the other: there is nothing to train on, and who asks a
    model puts its answers between them.
    """
    questions, answers = _strings(fields, "turns"), _strings(fields, "reference")
    if answers and len(answers) != len(questions):
        raise DataError(f"{len(questions)} questions in 'turns' and {len(answers)} answers in 'reference'")
    if not answers:
        return Example(tuple(Message("user", question) for question in questions), source)
    pairs = zip(questions, answers, strict=True)
    return Example(tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a))), source)


def _strings(fields: Fields, name: str) -> list[str]:
    cell = fields.get(name)
    return cell if isinstance(cell, list) and all(isinstance(each, str) for each in cell) else []


TURN_FORMATS = (
    Format(
        name="preference",
        signature="columns chosen, rejected (answers or whole conversations; prompt, messages or conversations)",
        columns={"chosen": ("chosen",), "rejected": ("rejected",), "messages": CONVERSATION, "prompt": PROMPT,
                 "system": SYSTEM},
        recognises=lambda fields: "chosen" in fields and "rejected" in fields,
        answer="chosen",
        read_turns=read_preference,
    ),
    Format(
        name="kto",
        signature="column label (true or false) with messages, or with prompt and completion",
        columns={"label": ("label",), "messages": CONVERSATION, "prompt": PROMPT, "completion": COMPLETION,
                 "system": SYSTEM},
        recognises=_is_kto,
        answer="messages",
        read_turns=read_kto,
    ),
    Format(
        name="messages",
        signature="column messages: list of {role, content}",
        columns={"messages": CONVERSATION, "prompt": ("prompt",), "completion": ("completion",), "system": SYSTEM,
                 "kind": ("kind",), "rejected": ("rejected",), "desirable": ("desirable",),
                 "references": ("references",), "group": ("split_group",)},
        recognises=_is_messages,
        answer="messages",
        read_turns=read_messages,
    ),
    Format(
        name="sharegpt",
        signature="column conversations: list of {from, value}",
        columns={"messages": CONVERSATION, "system": SYSTEM},
        recognises=lambda fields: _has_keys(value(fields, CONVERSATION), "from", "value"),
        answer="messages",
        read_turns=_sharegpt,
    ),
    Format(
        name="mt_bench",
        signature="columns question_id, turns: list of questions (reference: their answers)",
        columns={"question_id": ("question_id",), "turns": ("turns",), "reference": ("reference",)},
        recognises=lambda fields: "question_id" in fields and bool(_strings(fields, "turns")),
        answer="reference",
        read_turns=read_mt_bench,
    ),
)  # fmt: skip

"""Rows of columns, which a prompt template makes into a conversation: Alpaca, question/answer, SQuAD and others.

Each format names its fields once (`{context}`, `{question}`, `{answer}`), whatever the data call them, and has a
default template that adds as little of its own as it can: the chat style already says who speaks. A user's template
may use the format's names and the raw columns alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chulengo.data.format_definition import Fields, Format, NamedValues, column, value
from chulengo.data.formats_turns import SYSTEM
from chulengo.data.prompts import PromptTemplate, as_text
from chulengo.data.types import Message
from chulengo.errors import DataError

_ALPACA = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "system": SYSTEM,
    "history": ("history",),
}
_PAIR = {
    "prompt": ("prompt", "input", "query", "instruction"),
    "completion": ("completion", "response", "output"),
    "system": SYSTEM,
}
_QUESTION = {
    "question": ("question",),
    "answer": ("answer", "answers", "response"),
    "context": ("context",),
    "system": SYSTEM,
}
_PUBMEDQA = {
    "question": ("question",),
    "context": ("contexts", "context"),
    "answer": ("long_answer",),
    "decision": ("final_decision",),
}
_SQUAD = {"context": ("context",), "question": ("question",), "answer": ("answers",), "title": ("title",)}
_SQUAD_TEXTS = {ours: names for ours, names in _SQUAD.items() if ours != "answer"}
_SUMMARY = {"dialogue": ("dialogue", "dialog"), "summary": ("summary",)}
_LABEL = {"text": ("text", "sentence"), "label": ("label_text", "label_name", "label")}


def _texts(fields: Fields, columns: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    cells = {ours: value(fields, names) for ours, names in columns.items()}
    return {ours: cell if isinstance(cell, str) else as_text(cell, ours) for ours, cell in cells.items()}


def _read_alpaca(fields: Fields) -> NamedValues:
    history = value(fields, _ALPACA["history"]) or []
    named = _texts({k: v for k, v in fields.items() if k != "history"}, _ALPACA)
    named.pop("history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("column 'history' must be a list of [question, answer] pairs")
    earlier = [
        message
        for question, answer in history
        for message in (Message("user", as_text(question, "history")), Message("assistant", as_text(answer, "history")))
    ]
    return NamedValues(named, history=tuple(earlier))


def _read_question(fields: Fields) -> NamedValues:
    answers = value(fields, _QUESTION["answer"])
    if not isinstance(answers, list):
        return NamedValues(_texts(fields, _QUESTION))
    references = tuple(as_text(answer, "answers") for answer in answers)
    others = {ours: names for ours, names in _QUESTION.items() if ours != "answer"}
    return NamedValues({**_texts(fields, others), "answer": references[0] if references else ""}, references)


def _read_pubmedqa(fields: Fields) -> NamedValues:
    context = value(fields, _PUBMEDQA["context"])
    if isinstance(context, dict):  # the Hub's copy nests the paragraphs
        context = context.get("contexts")
    paragraphs = [as_text(p, "context") for p in (context if isinstance(context, list) else [context])]
    others = {ours: names for ours, names in _PUBMEDQA.items() if ours != "context"}
    return NamedValues({**_texts(fields, others), "context": "\n\n".join(paragraphs)})


def _read_squad(fields: Fields) -> NamedValues:
    references = tuple(_squad_answers(value(fields, _SQUAD["answer"])))
    return NamedValues({**_texts(fields, _SQUAD_TEXTS), "answer": references[0] if references else ""}, references)


def _squad_answers(answers: Any) -> list[str]:
    if isinstance(answers, dict):
        return [as_text(text, "answers") for text in answers.get("text") or []]
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers or []]
    return [text if isinstance(text, str) else as_text(text, "answers") for text in texts]


def _has(fields: Fields, columns: Mapping[str, tuple[str, ...]], *ours: str) -> bool:
    return all(column(fields, columns[name]) is not None for name in ours)


def _is_squad(fields: Fields) -> bool:
    answers = value(fields, _SQUAD["answer"])
    nested = isinstance(answers, dict) or (
        isinstance(answers, list) and (not answers or isinstance(answers[0], dict))
    )
    return nested and _has(fields, _SQUAD, "context", "question")


def _is_label(fields: Fields) -> bool:
    label = value(fields, _LABEL["label"])
    return isinstance(value(fields, _LABEL["text"]), str) and not isinstance(label, list | dict) and (
        column(fields, _LABEL["label"]) is not None
    )


def _format(
    name: str, signature: str, columns: Mapping[str, tuple[str, ...]], needs: tuple[str, ...], answer: str, user: str,
    **more: Any,
) -> Format:
    return Format(
        name=name,
        signature=signature,
        columns=columns,
        recognises=more.get("recognises", lambda fields: _has(fields, columns, *needs)),
        answer=answer,
        read_columns=more.get("read", lambda fields: NamedValues(_texts(fields, columns))),
        template=PromptTemplate(name, "{system}" if "system" in columns else None, user, "{" + answer + "}"),
    )  # fmt: skip


COLUMN_FORMATS = (
    _format("pubmedqa", "columns QUESTION, CONTEXTS, LONG_ANSWER (final_decision)", _PUBMEDQA,
            ("question", "context", "answer"), "answer", "{context}\n\n{question}", read=_read_pubmedqa),
    _format("squad", "columns context, question, answers {text, answer_start}, flat or nested as SQuAD v1", _SQUAD,
            ("context", "question", "answer"), "answer", "{context}\n\n{question}",
            read=_read_squad, recognises=_is_squad),
    _format("alpaca", "columns instruction, output (input, system, history)", _ALPACA,
            ("instruction", "output"), "output", "{instruction}\n\n{input}", read=_read_alpaca),
    _format("dialogue_summary", "columns dialogue, summary", _SUMMARY, ("dialogue", "summary"), "summary",
            "Summarise this conversation.\n\n{dialogue}"),
    _format("question_answer", "columns question, answer or answers (context)", _QUESTION, ("question", "answer"),
            "answer", "{context}\n\n{question}", read=_read_question),
    _format("prompt_completion", "columns prompt, completion (or prompt, response; input, output)", _PAIR,
            ("prompt", "completion"), "completion", "{prompt}"),
    _format("text_label", "columns text, label", _LABEL, ("text", "label"), "label",
            "{text}\n\nWhich label fits this text?", recognises=_is_label),
)  # fmt: skip

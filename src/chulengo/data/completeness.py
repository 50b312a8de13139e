"""What is missing in an example: the one definition of "a row without an answer" that loading and cleaning share.

A row whose last answer is missing is an error: nothing can be learned from it. An empty turn further up is not:
real chat sets have them (3 of the 1,000 rows of guanaco-llama2-1k), they render, and what follows is still an answer.
Such rows are counted in the load report and can be dropped (`drop_empty`).
"""

from __future__ import annotations

from chulengo.data.types import Example


def missing_answer(example: Example) -> str | None:
    """Returns in words why the last answer (of a pair, either answer) is missing, or None when it is there."""
    if example.kind == "text":
        return None
    if not example.messages:
        return "there are no turns"
    if example.messages[-1].role != "assistant":
        return f"the last turn is the {example.messages[-1].role}'s"
    if not example.messages[-1].content.strip():
        return "the last answer is empty"
    if example.kind == "preference" and not (example.rejected and example.rejected[-1].content.strip()):
        return "the rejected answer is empty"
    return None


def has_empty_turn(example: Example) -> bool:
    """Returns True when any turn (or the raw text) is empty."""
    return any(not message.content.strip() for message in example.messages)


def starts_with_answer(example: Example) -> bool:
    """Returns True when the assistant speaks before any user does."""
    spoken = [message.role for message in example.messages if message.role != "system"]
    return bool(spoken) and spoken[0] == "assistant"


def has_answer(example: Example) -> bool:
    """Returns True when some turn is an answer with text."""
    return any(message.role == "assistant" and message.content.strip() for message in example.messages)

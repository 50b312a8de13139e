"""How the client sees a conversation: with the roles swapped.

A chat model speaks as the assistant and reads the user. When it is to play the client, its own turns are therefore
rendered as the assistant's and the agent's as the user's, after a system prompt with persona and goal. Every chat
style begins with the user, and the client is to speak first: a cue, as an agent's greeting, stands before its first
turn. The agent never sees the cue or the system prompt.

`client_chat` writes a real dialogue in the same form, so that a client adapter can be trained on what it will read.
"""

from __future__ import annotations

from collections.abc import Sequence

from chulengo.data.prompts import fill
from chulengo.data.types import Message
from chulengo.evaluate.simulate.scenarios import Scenario

CLIENT_PROMPT = """You are the customer in this conversation. The other side is the help desk.

Who you are: {persona}

What you want: {goal}

Say one short message at a time, as the customer, and nothing else.

When you have what you want, say: {stop}"""
CLIENT_CUE = "Hello! How can I help you?"


def client_messages(scenario: Scenario, turns: Sequence[tuple[str, str]]) -> list[Message]:
    """Returns the conversation as the client model reads it, up to where it speaks.

    Args:
        scenario: who the client is and what it wants.
        turns: pairs of what the client said and what the agent answered.
    """
    named = {
        "persona": scenario.persona or "", "goal": scenario.goal or "",
        "stop": scenario.client_stop or "",
    }
    messages = [
        Message("system", fill(scenario.client_prompt or CLIENT_PROMPT, named)),
        Message("user", scenario.client_cue or CLIENT_CUE),
    ]
    for client, agent in turns:
        messages += [Message("assistant", client), Message("user", agent)]
    return messages


def agent_messages(scenario: Scenario, turns: Sequence[tuple[str, str]], question: str) -> list[Message]:
    """Returns the conversation as the agent reads it, up to where it answers `question`."""
    messages = [] if scenario.system is None else [Message("system", scenario.system)]
    for client, agent in turns:
        messages += [Message("user", client), Message("assistant", agent)]
    return [*messages, Message("user", question)]


def agent_chat(scenario: Scenario) -> tuple[Message, ...]:
    """Returns a real dialogue as the agent's training conversation, or () when nobody answered."""
    pairs = list(zip(scenario.script, scenario.real_answers, strict=False))
    if not pairs:
        return ()
    *before, (question, answer) = pairs
    return (*agent_messages(scenario, before, question), Message("assistant", answer))


def client_chat(scenario: Scenario) -> tuple[Message, ...]:
    """Returns a real dialogue as the client's training conversation: its own turns are the assistant's."""
    last = len(scenario.script) - 1
    pairs = list(zip(scenario.script[:last], scenario.real_answers, strict=False))
    return (*client_messages(scenario, pairs), Message("assistant", scenario.script[len(pairs)]))

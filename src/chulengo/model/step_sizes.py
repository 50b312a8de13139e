"""The few sizes that a graph's batches are filled up to: one rule for the step and, without torch, for the plan."""

from __future__ import annotations

TOKEN_STEP = 256  # tokens, targets and the longest sequence of a graph's batch are multiples of it


def filled_up(number: int, step: int = TOKEN_STEP) -> int:
    """Returns the next multiple of a step."""
    return -(-number // step) * step

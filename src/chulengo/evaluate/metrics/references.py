"""The references of the items, or one clear error that names every item without one.

Left alone, an item without a reference is dropped by some libraries, scored 0 by others, and shifts all later
references by one in a third kind. None of that can be seen in the score.
"""

from __future__ import annotations

from collections.abc import Sequence

from chulengo.errors import DataError
from chulengo.evaluate.metrics.metric import Outcome

_NAMED = 5  # ids shown in the error; the count is always whole


def references_of(outcomes: Sequence[Outcome], metric: str) -> list[tuple[str, ...]]:
    """Returns the references of each item, at least one each.

    Args:
        outcomes: the items.
        metric: name of the metric that needs them, for the error.

    Raises:
        DataError: some items have none; the message says how many and names the first.
    """
    without = [outcome.id for outcome in outcomes if not outcome.references]
    if without:
        named = ", ".join(without[:_NAMED]) + (", …" if len(without) > _NAMED else "")
        raise DataError(
            f"{len(without)} of {len(outcomes)} items have no reference, which {metric} needs: {named}.",
            next_step=f"give each of them a reference, leave those items out, or leave out {metric}",
        )
    return [outcome.references for outcome in outcomes]

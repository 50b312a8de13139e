"""One row's tokens in a terminal: which are trained, which are context, which are control tokens, where each ends.

In colour: trained tokens on green, context on grey, two shades of each in turn so that the borders show; control tokens
reversed. Without colour (a pipe, NO_COLOR): `│` between tokens, `⟦ ⟧` around what is trained. Spaces, tabs and line
breaks are drawn as ␣ ⇥ ⏎ in both. A token that is only a part of a character is drawn as `·`, the character itself
stands at its last token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

NUM_HEAD, NUM_TAIL = 700, 300  # of a longer row, the tokens shown
_SHADES = {True: ("black on #7fd08a", "black on #a8e6b0"), False: ("#e0e0e0 on #303030", "#e0e0e0 on #5a5a5a")}
_CONTROL = {True: "bold white on #00701a", False: "bold white on #6a3fa0"}


def coloured(ids: Sequence[int], trained: Sequence[bool], spelled: Sequence[str], controls: Collection[int]) -> Text:
    """Returns the row as coloured text.

    Args:
        ids: token ids.
        trained: which of them carry loss.
        spelled: the text of each (see `Renderer.spell`).
        controls: ids of control tokens.
    """
    from rich.text import Text

    text = Text()
    for index in _shown(len(ids)):
        if index is None:
            text.append(_left_out(len(ids)))
            continue
        control = ids[index] in controls
        style = _CONTROL[trained[index]] if control else _SHADES[trained[index]][index % 2]
        text.append(spelled[index] if control else visible(spelled[index]), style)
    return text


def marked(ids: Sequence[int], trained: Sequence[bool], spelled: Sequence[str], controls: Collection[int]) -> str:
    """Returns the row as plain text with `│` at token borders and `⟦ ⟧` around trained spans; see `coloured`."""
    parts = []
    inside = False
    for index in _shown(len(ids)):
        if index is None:
            parts.append(("⟧" if inside else "") + _left_out(len(ids)))
            inside = False
            continue
        border = "│" if parts else ""
        if trained[index] != inside:
            border = "⟦" if trained[index] else "⟧"
            inside = trained[index]
        parts.append(border + (spelled[index] if ids[index] in controls else visible(spelled[index])))
    return "".join(parts) + ("⟧" if inside else "")


def visible(text: str) -> str:
    """Returns the text with its white space drawn; a line break is drawn and kept."""
    if not text:
        return "·"
    drawn = text.replace(" ", "␣").replace("\t", "⇥").replace("\r", "␍").replace("\n", "⏎\n")
    # other control characters would act on the terminal
    return "".join(c if c == "\n" or c.isprintable() else f"\\u{ord(c):04x}" for c in drawn)


def _shown(count: int) -> list[int | None]:
    if count <= NUM_HEAD + NUM_TAIL:
        return list(range(count))
    return [*range(NUM_HEAD), None, *range(count - NUM_TAIL, count)]


def _left_out(count: int) -> str:
    return f"\n… {count - NUM_HEAD - NUM_TAIL:,} tokens not shown (--json has all) …\n"

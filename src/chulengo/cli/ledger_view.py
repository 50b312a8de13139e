"""The supervision ledger, lengths, scripts and load report as a reader sees them in a terminal."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from chulengo.data.ledger import NUM_NAMED, shared_file
from chulengo.data.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from chulengo.data.ledger import Ledger
    from chulengo.data.types import Example

NUM_BARS, BAR_CHARACTERS = 12, 40


def ledger_table(ledger: Ledger) -> Table:
    """Returns the ledger as a table of two columns."""
    from rich.table import Table

    share = f"{ledger.supervised_share:.1%} of the tokens"
    lengths = ledger.lengths
    after = "" if ledger.overlong == "error" else f" → {ledger.num_used_rows:,} used"
    rows = [
        ("rows", f"{ledger.num_rows:,}{after}"),
        ("tokens", f"{ledger.num_tokens:,}"),
        ("supervised tokens", f"{ledger.num_supervised_tokens:,} ({share})"),
        *([("encoder tokens", f"{ledger.num_encoder_tokens:,}")] if ledger.num_encoder_tokens else []),
        ("tokens by role", " · ".join(f"{role} {count:,}" for role, count in ledger.tokens_by_role.items()
                                      if count or role != "text")),
        ("rows without supervision", f"{len(ledger.unsupervised_rows):,}"),
        (f"rows over {ledger.max_seq_tokens:,} tokens", f"{len(ledger.long_rows):,} (policy: {ledger.overlong})"),
        *([("rows dropped", f"{ledger.num_dropped_rows:,}"), ("rows shortened", f"{ledger.num_shortened_rows:,}")]
          if ledger.overlong != "error" else []),
        *([("turns dropped", f"{ledger.num_dropped_turns:,}")] if ledger.overlong == "drop_turns" else []),
        *([("answers that lose their end", f"{len(ledger.cut_ends):,}")] if ledger.overlong == "cut" else []),
        ("repeated rows", f"{ledger.num_duplicate_rows:,} in {counted(len(ledger.duplicates), 'group')}"),
        ("row length in tokens", f"p5 {lengths.p5:,.0f} · p50 {lengths.p50:,.0f} · mean {lengths.mean:,.0f} · "
                                 f"p95 {lengths.p95:,.0f} · max {lengths.max:,}"),
        ("padding, rows as they come", " · ".join(f"{share:.0%} at batch {size}"
                                                 for size, share in ledger.padded_share.items())),
    ]
    table = Table(title="Supervision ledger", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", overflow="fold")
    for what, count in rows:
        table.add_row(what, count)
    return table


def length_bars(lengths: Sequence[int], limit: int) -> list[str]:
    """Returns a histogram of row lengths as lines of text; the bin that holds the limit is marked."""
    if not lengths:
        return []
    step = _round_up(max(lengths) / NUM_BARS)
    counts = Counter(length // step for length in lengths)
    most = max(counts.values())
    lines = []
    for index in range(max(counts) + 1):
        low, high = index * step, (index + 1) * step - 1
        bar = "█" * -(-counts[index] * BAR_CHARACTERS // most)  # rounded up: one row is still seen
        mark = "  ← limit" if low <= limit <= high else ""
        lines.append(f"{low:>9,} to {high:>9,} {counts[index]:>8,} {bar}{mark}".rstrip())
    return lines


def long_row_lines(ledger: Ledger) -> list[str]:
    """Returns the first rows over the limit, with their lengths and what became of them."""
    file = shared_file([row.source for row in ledger.long_rows])
    lines = [f"  {file}"] if file else []
    for row in ledger.long_rows[:NUM_NAMED]:
        left = f" → {row.num_used_tokens:,}" if row.num_used_tokens else " → dropped"
        fate = "" if ledger.overlong == "error" else left
        lines.append(f"  {row.source.removeprefix(file)}: {counted(row.num_tokens, 'token')}{fate}")
    more = len(ledger.long_rows) - NUM_NAMED
    return lines + ([f"  and {more:,} more (--json has all)"] if more > 0 else [])


def script_counts(examples: Iterable[Example]) -> dict[str, int]:
    """Returns script -> number of rows in which most letters are of it, most frequent first.

    A script is the first word of a letter's Unicode name (LATIN, CYRILLIC, CJK, …). It is no language: English and
    Spanish are both Latin.
    """
    rows: Counter[str] = Counter()
    known: dict[str, str | None] = {}
    for example in examples:
        letters: Counter[str] = Counter()
        for character, count in Counter("".join(m.content for m in example.messages)).items():
            if character not in known:
                known[character] = unicodedata.name(character, "?").split()[0] if character.isalpha() else None
            script = known[character]
            if script is not None:
                letters[script] += count
        script = letters.most_common(1)[0][0] if letters else "no letters"
        rows[script if script in ("CJK", "no letters") else script.title()] += 1
    return dict(rows.most_common())


def _round_up(width: float) -> int:
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= width:
                return size * factor
        size *= 10

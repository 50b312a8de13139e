"""The supervision ledger: what is about to be trained, counted before step 1, and every reason not to start.

Rows that are too long, rows without a single token that carries loss, answers whose end was cut off: each of them costs
quality without any error message, and each is common. So nothing is shortened unless a policy was named, and what the
policy did is written down row by row.

The policies for rows longer than `max_seq_tokens`:
- `error` (the default): report them;
- `drop`: leave them out;
- `drop_turns`: drop whole last turns until the row fits; a row whose first answer does not fit is left out. With
  loss on the last answer only, the answer that becomes the last is then the trained one;
- `cut`: keep the first `max_seq_tokens` tokens. A row that loses the end of a trained answer teaches the model not to
  stop, which is a problem of its own unless `allow_cut_end_of_turn` is set. An encoder's input keeps its last token;
- `split`, for raw texts: consecutive windows, each begun as a text is, so that every token is trained once. A
  conversation is never split.

`settle` decides and counts, and never raises; `check` raises once, with every problem and what mends it. Tokens mean
the decoder's, except where the encoder's input is named; duplicates are rows with identical tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from chulengo.data.renderer import ROLES, RenderedRow
from chulengo.data.wording import counted
from chulengo.errors import DataError

NUM_NAMED = 10  # rows named in a message; the dictionary has them all
PADDED_BATCHES = (4, 8)
PART = " part "  # between a text's source and the number of a window of it


@dataclass(frozen=True, slots=True)
class LongRow:
    """One row over the limit.

    Attributes:
        source: where it came from.
        num_tokens: its length before the policy.
        num_used_tokens: what is left of it; 0 when it was dropped.
    """

    source: str
    num_tokens: int
    num_used_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Row lengths in tokens."""

    p5: float
    p50: float
    mean: float
    p95: float
    max: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """The counts. Rows "used" and tokens are after the policy, lengths and duplicates before it.

    Attributes:
        num_rows: rows given.
        num_used_rows: rows left.
        num_tokens: tokens of the rows left.
        num_supervised_tokens: those that carry loss.
        num_encoder_tokens: tokens of the encoder's inputs (0 for decoder-only models).
        tokens_by_role: system, user, assistant, text (raw texts) and control (marks, headers, ends of turns) -> tokens
            of the rows left, the encoder's included.
        supervised_share: supervised tokens / tokens.
        max_seq_tokens: the limit.
        overlong: the policy.
        long_rows: every row over the limit.
        num_dropped_rows: rows the policy left out.
        num_shortened_rows: rows it shortened (cut, or last turns dropped).
        num_dropped_turns: answers that `drop_turns` dropped from rows that are used.
        cut_ends: sources of rows whose trained answer lost its end.
        unsupervised_rows: sources of used rows in which no token carries loss.
        duplicates: groups of sources with identical tokens.
        num_duplicate_rows: rows beyond the first of each group.
        lengths: of the rows given.
        padded_share: batch size -> share of padding when rows are batched in the data's order.
        problems: why training must not start, each with its mend.
    """

    num_rows: int
    num_used_rows: int
    num_tokens: int
    num_supervised_tokens: int
    num_encoder_tokens: int
    tokens_by_role: dict[str, int]
    supervised_share: float
    max_seq_tokens: int
    overlong: str
    long_rows: list[LongRow]
    num_dropped_rows: int
    num_shortened_rows: int
    num_dropped_turns: int
    cut_ends: list[str]
    unsupervised_rows: list[str]
    duplicates: list[list[str]]
    num_duplicate_rows: int
    lengths: Lengths
    padded_share: dict[int, float]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the ledger as JSON-able values."""
        content = asdict(self)
        content["padded_share"] = {str(size): share for size, share in self.padded_share.items()}
        return content


def settle(
    rows: Iterable[RenderedRow], *, max_seq_tokens: int, overlong: str, allow_cut_end_of_turn: bool
) -> tuple[list[RenderedRow], Ledger]:
    """Returns the rows to train on and their ledger. Never raises for what the rows contain.

    Args:
        rows: all rendered rows.
        max_seq_tokens: the longest row allowed, in tokens (encoder and decoder each).
        overlong: error, drop, drop_turns, cut or split; `error` leaves long rows in and makes them a problem.
        allow_cut_end_of_turn: whether `cut` may remove the end of a trained answer.
    """
    count = LedgerCount(
        max_seq_tokens=max_seq_tokens, overlong=overlong, allow_cut_end_of_turn=allow_cut_end_of_turn
    )
    used = [kept for row in rows for kept in count.settle_row(row)]
    return used, count.ledger()


class LedgerCount:
    """The ledger while rows go by: memory grows by some 100 bytes a row, whatever the rows' length."""

    def __init__(self, *, max_seq_tokens: int, overlong: str, allow_cut_end_of_turn: bool) -> None:
        """Starts at zero; the arguments are those of `settle`."""
        self._limit, self._overlong, self._allow_cut = max_seq_tokens, overlong, allow_cut_end_of_turn
        self._shorten = POLICIES[overlong]
        self.lengths = array("l")  # of all rows, before the policy
        self._used_lengths = array("l")
        self._supervised = self._encoder = self._dropped_turns = 0
        self._roles = [0] * len(ROLES)
        self._long_rows: list[LongRow] = []
        self._long_texts = 0
        self._cut_ends: list[str] = []
        self._unsupervised: list[str] = []
        self._seen: dict[bytes, str] = {}
        self._repeated: dict[bytes, list[str]] = {}

    def settle_row(self, row: RenderedRow) -> list[RenderedRow]:
        """Returns what is trained of a row under the policy (often the row itself); counts it in any case."""
        length = longest_side(row)
        self.lengths.append(length)
        key = _content_key(row)
        if key in self._seen:
            self._repeated.setdefault(key, [self._seen[key]]).append(row.source)
        else:
            self._seen[key] = row.source
        kept = [row]
        if length > self._limit:
            kept = self._shorten(row, self._limit)
            used = sum(map(longest_side, kept))
            self._long_rows.append(LongRow(row.source, length, used))
            self._long_texts += row.text_start is not None
            if kept and self._overlong == "drop_turns":
                self._dropped_turns += len(row.turn_ends) - len(kept[0].turn_ends)
            if kept and self._overlong == "cut" and _loses_end(row, self._limit):
                self._cut_ends.append(row.source)
        for part in kept:
            supervised = sum(part.trained)
            self._supervised += supervised
            self._encoder += len(part.encoder_ids or ())
            for role in range(len(ROLES)):
                self._roles[role] += part.roles.count(role) + part.encoder_roles.count(role)
            self._used_lengths.append(len(part.ids))
            if not supervised:
                self._unsupervised.append(part.source)
        return kept

    def ledger(self) -> Ledger:
        """Returns the ledger of the rows so far."""
        num_tokens = sum(self._used_lengths)
        num_dropped = sum(row.num_used_tokens == 0 for row in self._long_rows)
        duplicates = list(self._repeated.values())
        ledger = Ledger(
            num_rows=len(self.lengths),
            num_used_rows=len(self._used_lengths),
            num_tokens=num_tokens,
            num_supervised_tokens=self._supervised,
            num_encoder_tokens=self._encoder,
            tokens_by_role=dict(zip(ROLES, self._roles, strict=True)),
            supervised_share=self._supervised / num_tokens if num_tokens else 0.0,
            max_seq_tokens=self._limit,
            overlong=self._overlong,
            long_rows=self._long_rows,
            num_dropped_rows=num_dropped,
            num_shortened_rows=0 if self._overlong in ("error", "split") else len(self._long_rows) - num_dropped,
            num_dropped_turns=self._dropped_turns,
            cut_ends=self._cut_ends,
            unsupervised_rows=self._unsupervised,
            duplicates=duplicates,
            num_duplicate_rows=sum(len(group) - 1 for group in duplicates),
            lengths=_lengths(self.lengths),
            padded_share={size: _padded_share(self._used_lengths, size) for size in PADDED_BATCHES},
            problems=[],
        )
        return replace(ledger, problems=_problems(ledger, self._allow_cut, self._long_texts))


def check(ledger: Ledger) -> None:
    """Raises one error with every problem of the ledger, each with its mend; returns when there is none.

    Raises:
        DataError: the ledger has problems.
    """
    if ledger.problems:
        count = len(ledger.problems)
        what = "a problem" if count == 1 else f"{count} problems"
        raise DataError(f"The data have {what}:\n" + "\n".join(f"- {problem}" for problem in ledger.problems),
                        next_step="chulengo inspect shows every row and token")


def longest_side(row: RenderedRow) -> int:
    """Returns a row's length as the limit sees it: of an encoder-decoder pair the longer side, in tokens."""
    return max(len(row.ids), len(row.encoder_ids or ()))


def _unchanged(row: RenderedRow, limit: int) -> list[RenderedRow]:
    return [row]


def _dropped(row: RenderedRow, limit: int) -> list[RenderedRow]:
    return []


def _without_last_turns(row: RenderedRow, limit: int) -> list[RenderedRow]:
    fitting = [end for end in row.turn_ends if end <= limit]
    if not fitting or row.encoder_ids is not None:
        return []  # an encoder-decoder pair has one answer: nothing to drop from it
    end, count = fitting[-1], len(fitting)
    trained = row.trained[:end]
    if row.answer_spans is not None:
        start, stop = row.answer_spans[count - 1]
        trained[start:stop] = [True] * (stop - start)
    spans = None if row.answer_spans is None else row.answer_spans[:count]
    return [replace(row, ids=row.ids[:end], trained=trained, turn_ends=fitting, answer_spans=spans,
                    roles=row.roles[:end])]


def _cut(row: RenderedRow, limit: int) -> list[RenderedRow]:
    fitting = [end for end in row.turn_ends if end <= limit]
    encoder, encoder_roles = row.encoder_ids, row.encoder_roles
    if encoder is not None and len(encoder) > limit:
        encoder = [*encoder[: limit - 1], encoder[-1]]
        encoder_roles = encoder_roles[: limit - 1] + encoder_roles[-1:]
    spans = None if row.answer_spans is None else row.answer_spans[: len(fitting)]
    return [replace(row, ids=row.ids[:limit], trained=row.trained[:limit], turn_ends=fitting, answer_spans=spans,
                    encoder_ids=encoder, roles=row.roles[:limit], encoder_roles=encoder_roles)]


def _windows(row: RenderedRow, limit: int) -> list[RenderedRow]:
    if row.text_start is None or row.text_start >= limit:
        return [row]
    begin = row.ids[: row.text_start]
    size = limit - len(begin)
    parts = []
    for number, start in enumerate(range(len(begin), len(row.ids), size), 1):
        ids = [*begin, *row.ids[start : start + size]]
        trained = [False] * len(begin) + row.trained[start : start + size]
        if row.encoder_ids is None:
            trained[0] = False  # nothing stands before it
        source = f"{row.source}{PART}{number}"
        roles = row.roles[: len(begin)] + row.roles[start : start + size]
        parts.append(replace(row, ids=ids, trained=trained, source=source, turn_ends=[len(ids)], roles=roles))
    return parts


POLICIES = {
    "error": _unchanged, "drop": _dropped, "drop_turns": _without_last_turns, "cut": _cut, "split": _windows,
}  # fmt: skip


def _loses_end(row: RenderedRow, limit: int) -> bool:
    """Returns whether a cut at `limit` leaves a begun answer that carries loss, without its trained end."""
    following = next((end for end in row.turn_ends if end > limit), None)
    if following is None or not row.trained[following - 1]:
        return False
    begun = max((end for end in row.turn_ends if end <= limit), default=0)
    return any(row.trained[begun:limit])


def _content_key(row: RenderedRow) -> bytes:
    digest = hashlib.blake2b(array("l", row.ids).tobytes(), digest_size=16)
    digest.update(b"|" + array("l", row.encoder_ids or []).tobytes())
    return digest.digest()


def _lengths(lengths: Sequence[int]) -> Lengths:
    if not lengths:
        return Lengths(0.0, 0.0, 0.0, 0.0, 0)
    p5, p50, p95 = (float(p) for p in np.percentile(lengths, [5, 50, 95]))
    return Lengths(p5, p50, round(float(np.mean(lengths)), 1), p95, max(lengths))


def _padded_share(lengths: Sequence[int], batch_size: int) -> float:
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded if padded else 0.0


def _problems(ledger: Ledger, allow_cut_end_of_turn: bool, num_long_texts: int) -> list[str]:
    limit = counted(ledger.max_seq_tokens, "token")
    problems = []
    if ledger.num_rows == 0:
        problems.append("There are no rows. Try: other --data, or fewer data.cleaning steps")
    elif ledger.num_used_rows == 0:
        longer = "it is" if ledger.num_rows == 1 else f"all {ledger.num_rows:,} are"
        problems.append(f"No row is left: {longer} longer than {limit}. "
                        "Try: --set training.overlong=cut, or a larger training.max_seq_tokens")
    num_long = len(ledger.long_rows)
    named = _named([row.source for row in ledger.long_rows], [f": {r.num_tokens:,}" for r in ledger.long_rows])
    if ledger.overlong == "error" and num_long:
        policy = "split" if num_long_texts == num_long else "drop_turns (or drop, or cut)"
        problems.append(
            f"{_rows(num_long, ledger.num_rows)} longer than {limit}, and no policy for them is named "
            f"({named} tokens). Try: --set training.overlong={policy}, "
            "or a larger training.max_seq_tokens where the model's context allows it")
    if ledger.overlong == "split" and num_long_texts < num_long:
        problems.append(
            f"{_rows(num_long - num_long_texts, ledger.num_rows)} longer than {limit} and a conversation, which is "
            f"never split ({named} tokens). Try: --set training.overlong=drop_turns")
    if ledger.cut_ends and not allow_cut_end_of_turn:
        problems.append(
            f"{_rows(len(ledger.cut_ends), ledger.num_rows)} cut in mid-answer and would teach the model not to stop "
            f"({_named(ledger.cut_ends)}). Try: --set training.overlong=drop_turns, "
            "or --set training.allow_cut_end_of_turn=true")
    if ledger.unsupervised_rows:
        problems.append(
            f"{_rows(len(ledger.unsupervised_rows), ledger.num_rows)} without a single token that carries loss "
            f"({_named(ledger.unsupervised_rows)}). Try: remove rows without an answer, or see prompt.train_on, "
            "prompt.train_roles and training.max_seq_tokens")
    return problems


def _rows(count: int, total: int) -> str:
    return f"{count:,} of {counted(total, 'row')} {'is' if count == 1 else 'are'}"


def _named(sources: Sequence[str], details: Sequence[str] | None = None) -> str:
    """Returns the first sources in one line; a file that they share is named once."""
    file = shared_file(sources)
    after = details or [""] * len(sources)
    shown = [source.removeprefix(file) + text for source, text in zip(sources, after, strict=True)][:NUM_NAMED]
    more = len(sources) - NUM_NAMED
    return (f"{file} " if file else "") + ", ".join(shown) + (f", and {more:,} more" if more > 0 else "")


def shared_file(sources: Sequence[str]) -> str:
    """Returns the file that all sources (`path#row` or `path:line`) are of, or an empty string."""
    files = {source[: max(source.rfind("#"), source.rfind(":"))] for source in sources}
    file = files.pop() if len(files) == 1 else ""
    return file if all(source.startswith(file) for source in sources) and len(sources) > 1 else ""

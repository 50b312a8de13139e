"""What training, `inspect` and `plan` read before any weight is loaded: tokenizer, renderer, rows, ledger.

Nothing here imports torch, so that looking at the data stays quick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chulengo import nano
from chulengo.data.ledger import NUM_NAMED, Ledger, LedgerCount, check
from chulengo.data.load import LoadReport
from chulengo.data.renderer import RenderedRow, Renderer
from chulengo.data.row_store import RowStore
from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.data.types import Example
from chulengo.errors import ConfigError, DataError, RenderError
from chulengo.model.folder import context_tokens, is_encoder_decoder, read_config, usual_tokens

EMBEDDED_DATA = {"nano-demo": nano.demo_train, "nano-demo-heldout": nano.demo_heldout}


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rendered rows, what they were made of, and their ledger.

    Attributes:
        examples: the conversations of the data, those that the ledger's policy left out too; empty when streamed.
        rows: the rendered rows that are used.
        lengths: tokens of every row, before the policy.
        refused: why rows could not be rendered, one sentence each; a problem of the ledger too.
        ledger: counts over all of them.
        report: how they were read.
    """

    examples: Sequence[Example]
    rows: Sequence[RenderedRow]
    lengths: Sequence[int]
    refused: Sequence[str]
    ledger: Ledger
    report: LoadReport

    def fingerprint(self) -> str:
        """Returns a sha256 over ids and loss masks, in order: equal exactly when training would see the same."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.ids, row.trained, row.encoder_ids)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ExampleStream:
    """Examples that come one by one, and a function that returns their report once they have all come."""

    examples: Iterable[Example]
    report: Callable[[], LoadReport]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything a run needs before it loads weights."""

    folder: Path
    model_config: Mapping[str, Any]
    tokenizer: Tokenizer
    renderer: Renderer
    max_seq_tokens: int
    train: RowSet
    validation: RowSet | None


def check_rows(inputs: Inputs) -> None:
    """Raises one `DataError` with every problem of the training and the validation rows; returns when there is none."""
    problems = list(inputs.train.ledger.problems)
    if inputs.validation is not None:
        problems += [f"Validation: {problem}" for problem in inputs.validation.ledger.problems]
    check(replace(inputs.train.ledger, problems=problems))


def data_source(name: str) -> str:
    """Returns the path or Hub name that a data name stands for: the embedded sets have names of their own.

    Raises:
        DataError: no name was given.
    """
    if not name:
        raise DataError(
            "No data was given.",
            allowed="a file, a folder, a Hub data set name, or " + ", ".join(EMBEDDED_DATA),
            next_step="--data conversations.jsonl",
        )
    return str(EMBEDDED_DATA[name]()) if name in EMBEDDED_DATA else name


def sequence_limit(wanted: int | None, model_config: Mapping[str, Any]) -> int:
    """Returns the longest row in tokens: what was asked for, else the model's context or pretraining length.

    Raises:
        ConfigError: more was asked for than the model's positions cover, or nothing was and nothing is known.
    """
    context = context_tokens(dict(model_config))
    if wanted is None:
        usual = usual_tokens(dict(model_config))
        if usual is None:
            raise ConfigError(
                "The model's config.json states no context length.", next_step="--set training.max_seq_tokens=1024"
            )
        return usual
    if context is not None and wanted > context:
        raise ConfigError(
            f"training.max_seq_tokens is {wanted}, but the model's positions end at {context}.",
            allowed=f"1 to {context}",
            next_step=f"--set training.max_seq_tokens={context}",
        )
    return wanted


def open_renderer(
    folder: Path, *, style: str, system: str | None, train_on: str, train_roles: Sequence[str], train_end_of_turn: bool
) -> tuple[Mapping[str, Any], Tokenizer, Renderer]:
    """Returns the model's config (empty for a folder that only holds a tokenizer), its tokenizer and its renderer."""
    model_config = read_config(folder) if (folder / "config.json").is_file() else {}
    tokenizer = load_tokenizer(folder)
    renderer = Renderer(
        tokenizer,
        style=style,
        system=system,
        train_on=train_on,
        train_roles=tuple(train_roles),
        train_end_of_turn=train_end_of_turn,
        model_type=model_config.get("model_type"),
        encoder_decoder=is_encoder_decoder(dict(model_config)),
    )
    return model_config, tokenizer, renderer


@dataclass(frozen=True, slots=True)
class RowPolicy:
    """What happens to rows that are too long; see `config.schema.TrainingConfig`."""

    max_seq_tokens: int
    overlong: str
    allow_cut_end_of_turn: bool


def render_all(examples: Sequence[Example], report: LoadReport, renderer: Renderer, policy: RowPolicy) -> RowSet:
    """Returns the rendered rows and their ledger. Problems are in the ledger; nothing is raised for them."""
    count, refused = _ledger_count(policy), list[str]()
    rows = list(_settled(examples, renderer, count, refused))
    return RowSet(examples, rows, count.lengths, refused, _with_refusals(count.ledger(), refused, renderer), report)


def render_stream(stream: ExampleStream, renderer: Renderer, policy: RowPolicy) -> RowSet:
    """Returns the same for examples that come one by one and are not kept; the rows lie on disk."""
    count, refused = _ledger_count(policy), list[str]()
    rows = RowStore(_settled(stream.examples, renderer, count, refused))
    ledger = _with_refusals(count.ledger(), refused, renderer)
    return RowSet((), rows, count.lengths, refused, ledger, stream.report())


def _ledger_count(policy: RowPolicy) -> LedgerCount:
    return LedgerCount(
        max_seq_tokens=policy.max_seq_tokens, overlong=policy.overlong,
        allow_cut_end_of_turn=policy.allow_cut_end_of_turn,
    )


def _settled(
    examples: Iterable[Example], renderer: Renderer, count: LedgerCount, refused: list[str]
) -> Iterator[RenderedRow]:
    for example in examples:
        try:
            row = renderer.render(example)
        except RenderError as error:
            refused.append(str(error))
            continue
        yield from count.settle_row(row)


def _with_refusals(ledger: Ledger, refused: Sequence[str], renderer: Renderer) -> Ledger:
    if not refused:
        return ledger
    named = "".join(f"\n    {text.splitlines()[0]}" for text in refused[:NUM_NAMED])
    more = f"\n    and {len(refused) - NUM_NAMED:,} more" if len(refused) > NUM_NAMED else ""
    problem = (
        f"{len(refused):,} row{'s' if len(refused) > 1 else ''} cannot be rendered in the style {renderer.style} "
        f"(chulengo inspect --cleaning lists steps that mend or drop such rows):{named}{more}"
    )
    return replace(ledger, problems=[*ledger.problems, problem])

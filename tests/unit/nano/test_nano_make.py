"""The script that makes the embedded model, run whole as a toy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import make_nano
import nano_corpus
import nano_tokenizer
from chulengo import nano
from chulengo.nano.world import write_document


def test_a_toy_from_nothing(tmp_path: Path) -> None:
    assert make_nano.main(["--smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert record["steps"] == 8
    assert record["losses"][-1][1] < record["losses"][0][1] or len(record["losses"]) == 1
    assert set(record["perplexity"]) == {"answers", "all"}
    assert record["tokenizer"]["trained_in_this_run"]
    assert {"model.safetensors", "config.json", "tokenizer.model", "MODEL_CARD.md"} <= {
        path.name for path in tmp_path.iterdir()
    }
    from chulengo.model.folder import check_folder

    assert check_folder(tmp_path) == tmp_path


def test_packed_rows_hold_every_document_once(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load_tokenizer(nano.model_dir())
    rows, num_too_long = nano_corpus.write_corpus(nano.model_dir(), 4, 60, 512, 1)
    wanted = sorted(
        tuple(entries.tolist())
        for entries in (nano_corpus.encode_document(tokenizer, write_document(4, index)) for index in range(60))
        if len(entries) <= 512
    )
    assert num_too_long == 60 - len(wanted)
    found = []
    for row in rows:
        starts = np.flatnonzero(row & nano_corpus.START_BIT)
        for first, end in zip(starts, [*starts[1:], len(row)], strict=True):
            entries = row[first:end]
            entries = entries[(entries & nano_corpus.ID_MASK) != 0]
            if len(entries):
                found.append(tuple(entries.tolist()))
    assert sorted(found) == wanted

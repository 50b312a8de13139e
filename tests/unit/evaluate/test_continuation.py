"""Losses on plain text against a loop in fp64; windows, strides, beginnings and bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models as tiny
from chulengo.errors import ModelError
from chulengo.evaluate.continuation import (
    Windowing,
    text_counts,
    text_metrics,
    window_losses,
    windowing_for,
    windows_of,
)
from chulengo.evaluate.scoring import score_counts

TEXT = "Čhulengo — a young guanaco 🦙 of the Andes. " * 6


class Bytes:
    """A token a byte; a character outside ASCII is several tokens that start at the same place."""

    bos_id: int | None = tiny.BOS
    pad_id = None
    eos_id = tiny.EOS

    def encode(self, text: str, *, prefix: bool = True) -> tuple[list[int], list[int]]:
        pairs = [(byte, place) for place, character in enumerate(text) for byte in character.encode()]
        return [byte for byte, _ in pairs], [place for _, place in pairs]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.tiny_llama(initializer_range=0.1)


def windows(windowing: Windowing, *texts: str) -> Any:
    given = [(f"t{n}", f"t{n}", text) for n, text in enumerate(texts or (TEXT,))]
    return windows_of(Bytes(), given, windowing)  # type: ignore[arg-type]


def by_hand(model: Any, text: str, windowing: Windowing) -> tuple[float, int]:
    """Scores token after token: each one in the first window that holds it, everything in fp64."""
    ids = list(text.encode())
    total, count = 0.0, 0
    first_room = windowing.window - (windowing.bos != "none")
    room = windowing.window - (windowing.bos == "window")
    for place in range(len(ids)):
        if place < first_room:
            start, bos = 0, windowing.bos != "none"
        else:
            step = (place - first_room) // windowing.stride + 1
            start = min(first_room + step * windowing.stride, len(ids)) - room
            bos = windowing.bos == "window"
            if start < 0:
                start = 0
        before = ([tiny.BOS] if bos else []) + ids[start:place]
        if not before:
            continue
        with torch.no_grad():
            chances = torch.log_softmax(model(torch.tensor([before])).logits[0, -1].double(), -1)
        total -= float(chances[ids[place]])
        count += 1
    return total, count


@pytest.mark.parametrize("bos", ["window", "document", "none"])
@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 31), (64, 5), (128, 100)])
def test_equals_token_after_token(llama: Any, window: int, stride: int, bos: str) -> None:
    text = TEXT[:60]
    windowing = Windowing(window, stride, bos)
    losses = window_losses(llama, windows(windowing, text), pad_id=0)
    total, count = by_hand(llama, text, windowing)
    assert int(losses.targets.sum()) == count
    assert losses.nll.sum() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("bos", ["window", "document", "none"])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (16, 4), (16, 15), (100, 30), (4000, 10)])
def test_every_token_once_and_every_byte(window: int, stride: int, bos: str) -> None:
    made = windows(Windowing(window, stride, bos), TEXT, "ab", "🦙")
    size = len(TEXT.encode()) + 2 + 4
    unscored = 3 if bos == "none" else 0
    assert sum(sum(each.row.trained) for each in made) == size - unscored
    # the first byte token of 🦙 and of Č holds no character of its own; the next ones' places say where it ends
    assert sum(each.num_bytes for each in made) == size - (1 if bos == "none" else 0)
    assert all(len(each.row.ids) <= window for each in made)
    assert not any(each.row.trained[0] for each in made)
    assert next(each.id for each in made if each.group == "t1") == "t1/1"


def test_batches_and_order_change_nothing(llama: Any) -> None:
    made = windows(Windowing(48, 20, "window"), TEXT, TEXT[5:90], "x")
    one = window_losses(llama, made, pad_id=0, batch_size=1)
    eight = window_losses(llama, made, pad_id=7, batch_size=8)
    assert eight.nll == pytest.approx(one.nll, rel=1e-6)
    assert eight.nll.sum() == pytest.approx(one.nll.sum(), rel=1e-6)
    assert (eight.targets == one.targets).all()
    assert (eight.hits == one.hits).all()


def test_scores(llama: Any) -> None:
    windowing = Windowing(48, 20, "window")
    made = windows(windowing)
    losses = window_losses(llama, made, pad_id=0)
    metrics, counts = text_metrics(windowing), text_counts(losses, made)
    ids = [each.id for each in made]
    scores = {
        name: score_counts([metrics[name]], ids, ids, [counts[name]], draws=100)[0] for name in metrics
    }
    tokens, size = int(losses.targets.sum()), len(TEXT.encode())
    assert tokens == size  # a token a byte
    assert scores["perplexity"].value == pytest.approx(math.exp(losses.nll.sum() / tokens))
    assert scores["bits_per_byte"].value == pytest.approx(losses.nll.sum() / size / math.log(2))
    assert scores["next_token_accuracy"].value == losses.hits.sum() / tokens
    for score in scores.values():
        assert "windows of 48 tokens" in score.definition
        assert "20 new tokens" in score.definition
        assert "stands before every window" in score.definition
    assert np.isclose(scores["bits_per_byte"].value, math.log2(scores["perplexity"].value))


def test_what_a_model_cannot_do_is_said(llama: Any) -> None:
    class WithoutBos(Bytes):
        bos_id = None

    assert windowing_for(Bytes(), Windowing(64, 32, "window"), 128) == (Windowing(64, 32, "window"), [])  # type: ignore[arg-type]
    found, notes = windowing_for(WithoutBos(), Windowing(512, 256, "window"), 128)  # type: ignore[arg-type]
    assert found == Windowing(128, 127, "none")
    assert len(notes) == 3
    with pytest.raises(ModelError, match="encoder-decoder"):
        window_losses(tiny.tiny_t5(), windows(Windowing(8, 4, "none")), pad_id=0)

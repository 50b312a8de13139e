from __future__ import annotations

import math
import random

import pytest
import torch

from chulengo.errors import ModelError
from chulengo.generate.sampling import choose_tokens, kept_probabilities
from chulengo.generate.settings import GenerationSettings


def settings(**changes: float) -> GenerationSettings:
    return GenerationSettings(**{"temperature": 1.0, **changes})  # type: ignore[arg-type]


def by_token(logits: torch.Tensor, chosen: GenerationSettings) -> torch.Tensor:
    kept, order = kept_probabilities(logits, chosen)
    spread = torch.zeros_like(logits).scatter(-1, order, kept)
    return spread / spread.sum(-1, keepdim=True)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 4.0]])
    assert choose_tokens(logits, settings(temperature=0), uniforms=[], seen_BV=None) == [1, 0]


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    # probabilities 0.5, 0.3, 0.2 in the order of their size: cuts at 0.5 and 0.8
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    draws = {0.0: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 0, 1 - 1e-16: 0}
    for uniform, token in draws.items():
        assert choose_tokens(logits, settings(), uniforms=[uniform], seen_BV=None) == [token]


def test_frequencies_follow_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    generator = random.Random(0)
    count = 20_000
    uniforms = [generator.random() for _ in range(count)]
    tokens = choose_tokens(logits.expand(count, 3), settings(temperature=2.0), uniforms=uniforms, seen_BV=None)
    expected = torch.softmax(logits[0] / 2.0, -1)
    for token in range(3):
        # four standard deviations
        margin = 4 * math.sqrt(float(expected[token] * (1 - expected[token])) / count)
        assert tokens.count(token) / count == pytest.approx(float(expected[token]), abs=margin)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.3), (5, 1.0), (7, 0.8), (1, 1.0), (1000, 0.999)])
def test_cut_offs_equal_transformers(top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(1)
    logits = torch.randn(6, 50) * 3
    ours = by_token(logits, settings(temperature=0.7, top_k=top_k, top_p=top_p))
    ids = torch.zeros(6, 1, dtype=torch.long)
    theirs = TemperatureLogitsWarper(0.7)(ids, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(ids, theirs)
    theirs = torch.softmax(TopPLogitsWarper(top_p)(ids, theirs), -1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (by_token(logits, settings(top_p=0.6))[0] > 0).tolist() == [True, True, False]
    assert (by_token(logits, settings(top_p=1e-9))[0] > 0).tolist() == [True, False, False]


def test_a_cut_off_token_is_never_drawn() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    tokens = {choose_tokens(logits, settings(top_p=0.6), uniforms=[i / 1000], seen_BV=None)[0] for i in range(1000)}
    tokens |= set(choose_tokens(logits, settings(top_p=0.6), uniforms=[1 - 2**-53], seen_BV=None))
    assert tokens == {0, 1}


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(2)
    logits, context = torch.randn(8, 20), torch.randint(0, 20, (8, 12))
    seen = torch.zeros(8, 20, dtype=torch.bool).scatter(1, context, True)
    theirs = RepetitionPenaltyLogitsProcessor(4.0)(context, logits.clone()).argmax(-1).tolist()
    chosen = settings(temperature=0, repetition_penalty=4.0)
    assert choose_tokens(logits, chosen, uniforms=[], seen_BV=seen) == theirs
    assert theirs != logits.argmax(-1).tolist()  # else the test says nothing


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    logits = torch.tensor([[90.0, 100.0, 99.0]])
    assert choose_tokens(logits, settings(temperature=1e-30), uniforms=[0.999], seen_BV=None) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_stops(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(ModelError, match="NaN"):
        choose_tokens(logits, settings(temperature=temperature), uniforms=[0.5, 0.5], seen_BV=None)

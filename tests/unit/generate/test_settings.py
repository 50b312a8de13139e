from __future__ import annotations

import pytest

from chulengo.errors import ConfigError
from chulengo.generate.settings import GenerationSettings, item_seed, with_setting


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationSettings(max_new_tokens=0, temperature=-1, top_p=0, top_k=-1, repetition_penalty=0, seed=-1)
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"):
        assert name in str(caught.value)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf")])
def test_temperature_must_be_a_number(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        GenerationSettings(temperature=temperature)


def test_one_setting_changes() -> None:
    changed = with_setting(GenerationSettings(), "top-k", "40")
    assert changed == GenerationSettings(top_k=40)
    assert with_setting(changed, "Temperature", "0.7").temperature == 0.7


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("temprature", "1", "temperature"), ("top_k", "1.5", "whole number"), ("temperature", "warm", "a number"),
        ("top_p", "2", "at most 1"),
    ],
)
def test_a_bad_setting_says_what_is_allowed(name: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_setting(GenerationSettings(), name, text)


def test_item_seeds() -> None:
    assert item_seed(7, 0) == 7
    seeds = {item_seed(seed, index) for seed in range(30) for index in range(1, 30)}
    assert len(seeds) == 30 * 29
    # exact in every JSON reader
    assert max(seeds) < 2**53


def test_describe() -> None:
    assert GenerationSettings().describe() == "greedy, at most 256 tokens"
    warm = GenerationSettings(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1, seed=3)
    assert warm.describe() == "temperature 0.7, top-p 0.9, top-k 5, seed 3, repetition penalty 1.1, at most 256 tokens"

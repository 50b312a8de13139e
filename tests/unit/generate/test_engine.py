"""The engine against `model.generate`, against itself one by one, and at its limits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny_models as tiny
from chulengo.data.types import Message
from chulengo.errors import ModelError
from chulengo.generate.engine import (
    Answer,
    Prompt,
    answer_all,
    chat_prompt,
    complete_all,
    raw_prompt,
    stream,
    stream_answer,
)
from chulengo.generate.settings import GenerationSettings, item_seed

GREEDY = GenerationSettings(max_new_tokens=24)
WARM = GenerationSettings(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=5)
DECODER_ONLY = [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_mistral, tiny.tiny_bloom, tiny.tiny_mamba]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.tiny_llama()


def prompts(count: int = 11, stop: frozenset[int] = frozenset({tiny.EOS})) -> list[Prompt]:
    numbers = random.Random(3)
    decode = tiny.ByteRenderer().decode
    return [
        Prompt((tiny.BOS, *(numbers.randrange(256) for _ in range(numbers.randrange(1, 40)))), stop, decode)
        for _ in range(count)
    ]


def stop_tokens(model: Any, settings: GenerationSettings = GREEDY) -> frozenset[int]:
    """Tokens that end every second row, each at another step, so that rows leave the batch."""
    answers = complete_all(model, prompts(stop=frozenset()), settings, 1)
    return frozenset(answer.ids[2 + index] for index, answer in enumerate(answers[::2]))


def reference(model: Any, prompt: Prompt, **settings: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    ids = torch.tensor([prompt.ids])
    # T5's generation_config wants its own fields
    config = GenerationConfig(
        max_new_tokens=24, do_sample=False, eos_token_id=sorted(prompt.stop_ids) or None, pad_token_id=0,
        decoder_start_token_id=0, **settings,
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    new = out[1:] if model.config.is_encoder_decoder else out[len(prompt.ids):]
    return tuple(new[:-1]) if new[-1] in prompt.stop_ids else tuple(new)


@pytest.mark.parametrize("make", [*DECODER_ONLY, tiny.tiny_t5])
def test_greedy_batches_equal_generate_one_by_one(make: Callable[[], Any]) -> None:
    model = make()
    stop = stop_tokens(model)
    asked = prompts(stop=stop)
    expected = [reference(model, prompt) for prompt in asked]
    for batch_size in (1, 4, 11):
        answers = complete_all(model, asked, GREEDY, batch_size)
        assert [answer.ids for answer in answers] == expected
    # rows did leave the batch at different steps, some by reaching the limit
    assert len({len(answer.ids) for answer in answers}) > 2
    unstopped = complete_all(model, prompts(), GREEDY, 4)
    assert [answer.ids for answer in unstopped] == [reference(model, prompt) for prompt in prompts()]
    assert {answer.finish_reason for answer in unstopped} >= {"length"}


def test_repetition_penalty_equals_generate(llama: Any) -> None:
    asked = prompts(stop=stop_tokens(llama))
    settings = GenerationSettings(max_new_tokens=24, repetition_penalty=1.5)
    answers = complete_all(llama, asked, settings, 4)
    assert [a.ids for a in answers] == [reference(llama, p, repetition_penalty=1.5) for p in asked]
    assert [a.ids for a in answers] != [a.ids for a in complete_all(llama, asked, GREEDY, 4)]


def test_repetition_penalty_of_an_encoder_decoder_equals_generate() -> None:
    model = tiny.tiny_t5()
    asked = prompts(5, stop=stop_tokens(model))
    settings = GenerationSettings(max_new_tokens=24, repetition_penalty=1.5)
    answers = complete_all(model, asked, settings, 3)
    assert [a.ids for a in answers] == [reference(model, p, repetition_penalty=1.5) for p in asked]


def test_a_sampled_answer_does_not_depend_on_its_batch(llama: Any) -> None:
    asked = prompts(stop=stop_tokens(llama, WARM))
    together = complete_all(llama, asked, WARM, 11)
    assert [a.ids for a in together] == [a.ids for a in complete_all(llama, asked, WARM, 3)]
    for index, answer in enumerate(together):
        assert answer.seed == item_seed(WARM.seed, index)
        alone = complete_all(llama, [asked[index]], WARM, 1, seeds=[answer.seed])[0]
        assert alone.ids == answer.ids
        again = GenerationSettings(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=answer.seed)
        assert complete_all(llama, [asked[index]], again)[0].ids == answer.ids
    backwards = complete_all(llama, asked[::-1], WARM, 4, seeds=[a.seed for a in together][::-1])
    assert [a.ids for a in backwards] == [a.ids for a in together][::-1]


def test_the_same_prompt_twice_is_sampled_twice(llama: Any) -> None:
    first, second = complete_all(llama, prompts(1, frozenset()) * 2, WARM)
    assert first.ids != second.ids


def finished(generator: Any) -> tuple[list[str], Answer]:
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("settings", [GREEDY, WARM])
def test_a_stream_is_the_answer(llama: Any, settings: GenerationSettings) -> None:
    asked = prompts(6)
    for prompt, answer in zip(asked, complete_all(llama, asked, settings, seeds=[settings.seed] * 6), strict=True):
        pieces, streamed = finished(stream(llama, prompt, settings))
        assert streamed.ids == answer.ids
        assert "".join(pieces) == streamed.text == answer.text
        assert all(pieces)


def test_conversations_go_through_the_renderer(llama: Any) -> None:
    talk = [Message("system", "s"), Message("user", "hello")]
    renderer: Any = tiny.ByteRenderer()
    answers = answer_all(llama, renderer, [talk, talk[1:]], GREEDY, batch_size=2)
    assert answers[0].num_prompt_tokens == 1 + len("s:s\nu:hello")
    assert finished(stream_answer(llama, renderer, talk, GREEDY))[1].ids == answers[0].ids


def test_the_context_is_never_exceeded(llama: Any) -> None:
    decode = tiny.ByteRenderer().decode
    lengths = [100, 120, 127, 128, 129, 500]
    asked = [Prompt((tiny.BOS, *[65] * (n - 1)), frozenset(), decode) for n in lengths]
    answers = complete_all(llama, asked, GREEDY, 6)
    assert [len(a.ids) for a in answers] == [24, 8, 1, 0, 0, 0]
    assert [a.finish_reason for a in answers] == ["length", *["context"] * 5]
    assert [a.num_prompt_tokens for a in answers] == lengths
    pieces, answer = finished(stream(llama, asked[-1], GREEDY))
    assert pieces == []
    assert answer.finish_reason == "context"


def test_stop_on_the_first_token_is_an_empty_answer(llama: Any) -> None:
    prompt = prompts(1, frozenset())[0]
    first = complete_all(llama, [prompt], GREEDY)[0].ids[0]
    answer = complete_all(llama, [Prompt(prompt.ids, frozenset({first}), prompt.decode)], GREEDY)[0]
    assert (answer.text, answer.ids, answer.finish_reason) == ("", (), "stop")


def test_raw_prompts_start_at_bos_and_keep_the_space() -> None:
    tokenizer: Any = tiny.ByteTokenizer()
    prompt = raw_prompt(tokenizer, "ab")
    assert prompt.ids == (tiny.BOS, *b"ab")
    assert prompt.decode(list(b" cd ")) == " cd "
    assert prompt.stop_ids == {tiny.EOS}
    assert raw_prompt(tokenizer, "").ids == (tiny.BOS,)
    assert raw_prompt(tokenizer, "ab", encoder_decoder=True).ids == (*b"ab", tiny.EOS)


def test_raw_needs_something_to_start_from() -> None:
    class NoStart(tiny.ByteTokenizer):
        bos_id: Any = None

    with pytest.raises(ModelError, match="empty"):
        raw_prompt(NoStart(), "")  # type: ignore[arg-type]


def test_the_mode_of_the_model_is_restored(llama: Any) -> None:
    renderer: Any = tiny.ByteRenderer()
    llama.train()
    try:
        generator = stream(llama, chat_prompt(renderer, [Message("user", "x")]), GREEDY)
        next(generator)
        assert not llama.training
        generator.close()
        assert llama.training
    finally:
        llama.eval()


def test_nothing_to_do() -> None:
    assert complete_all(None, [], GREEDY) == []


def test_a_broken_model_is_named() -> None:
    model = tiny.tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        complete_all(model, prompts(2), GREEDY)


def test_training_goes_on_after_answers() -> None:
    model = tiny.tiny_llama().train()
    complete_all(model, prompts(3), GREEDY)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None

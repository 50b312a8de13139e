"""How many tokens the cache may hold: by hand for Llama 2 7B, from what a GPU says, and as a session asks for it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_models as tiny
from chulengo.model import cache_room, decode, session
from chulengo.model.base_record import BaseRecord, save_base_record
from chulengo.model.cache_room import FIRST_USE_BYTES, held_bytes, limit_cache, read_bytes, tokens_within
from chulengo.model.plan_memory import CUDA_CONTEXT_BYTES
from chulengo.model.plan_shapes import read_shape
from fast_models import make_fast

GIB = 1 << 30
LLAMA_2_7B = read_shape({
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
})  # fmt: skip
LLAMA_3_8B = read_shape({
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
})  # fmt: skip
BF16 = torch.bfloat16
# NF4 with double quantisation 3,341 MB, embeddings and head 524, adapter of rank 16 in both forms 240, norms and
# rotary tables 3
LOADED = 4_108_000_000
BUFFER = 2 * 11008 * 4096 * 2  # gate and up in 16 bits


def test_bytes_of_a_token_by_hand() -> None:
    assert LLAMA_2_7B is not None
    assert LLAMA_3_8B is not None
    # 32 layers of keys and values of 4,096 numbers, one layer more, 1/256 of 32,000 logits
    assert held_bytes(LLAMA_2_7B, BF16) == 32 * 16_384 + 16_384 + 6_000 == 546_672
    # seven states of 4,096, attention's 4,096, gate, up and their product of 11,008
    assert read_bytes(LLAMA_2_7B, BF16) == 2 * (7 * 4096 + 4096 + 3 * 11008) == 131_584
    assert held_bytes(LLAMA_3_8B, BF16) == 33 * 4096 + 24_048
    assert read_bytes(LLAMA_3_8B, BF16) == 2 * (8 * 4096 + 3 * 14336)


def test_rows_of_llama_2_7b_by_hand() -> None:
    assert LLAMA_2_7B is not None

    def tokens(limit: float) -> int:
        return tokens_within(int(limit * GIB) - LOADED - BUFFER - FIRST_USE_BYTES, LLAMA_2_7B, BF16)

    # 5,862.6 - 4,108.0 - 180.4 - 100.7 = 1,473.6 MB, of 678,256 bytes a token
    assert tokens(5.46) == 2172
    assert [tokens(5.46) // places for places in (256, 512, 2048)] == [8, 4, 1]
    # 13,958.6 - 4,389.0 = 9,569.6 MB: read 8,192 at a time, 1,077.9 MB, the rest of 546,672 bytes a token
    assert tokens(13) == 15_533
    assert tokens(4) == tokens(0) == 0


def test_more_room_is_never_fewer_tokens_and_all_of_it_fits() -> None:
    for sizes in (LLAMA_2_7B, LLAMA_3_8B):
        assert sizes is not None
        held, read = held_bytes(sizes, BF16), read_bytes(sizes, BF16)
        before = 0
        for room in range(0, 16 * GIB, GIB // 7):
            found = tokens_within(room, sizes, BF16)
            assert found >= before
            assert found * held + min(found, decode.PROMPT_TOKENS) * read <= room
            before = found
        assert before > decode.PROMPT_TOKENS


class TestMatrices:
    @pytest.mark.parametrize("weights", ["stream", "resident"])
    @pytest.mark.parametrize("quantization", ["nf4", "none"])
    @pytest.mark.parametrize("form", ["folded", "separate"])
    def test_unwritten_bytes_are_those_of_the_first_use(
        self, family_folder: Any, weights: str, quantization: str, form: str
    ) -> None:
        model = make_fast(family_folder("qwen 3"), weights=weights, quantization=quantization, lora={"form": form})
        expected = model.unwritten_bytes()
        model.logits([1, 2, 3])
        kept = [group.resident_OI for group in model.weights.groups()]
        written = sum(matrix.nbytes for matrix in kept if matrix is not None)
        buffer = model._matrices._buffer
        assert expected == written + (0 if buffer is None else buffer.nbytes)
        assert (expected == 0) == (quantization == "none" and form == "separate")
        assert model.unwritten_bytes() == 0

    def test_a_buffer_that_grows_is_not_there_twice(
        self, family_folder: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_fast(family_folder("qwen 3"))
        layer, empty, gone = model.weights.layers[0], torch.empty, []
        model._matrices.of(layer.o)
        before = weakref.ref(model._matrices._buffer)

        def watched(*given: Any, **named: Any) -> torch.Tensor:
            gone.append(before() is None)
            return empty(*given, **named)

        monkeypatch.setattr(torch, "empty", watched)
        model._matrices._buffer_for(layer.gate_up)
        assert gone == [True]

    def test_weights_that_are_their_own_matrix(self, family_folder: Any) -> None:
        from chulengo.model.fast import load_fast

        model = load_fast(family_folder("qwen 3"), quantization="none", device="cpu", weights="resident")
        assert model.unwritten_bytes() == 0


class TestLimit:
    def limited(
        self, monkeypatch: pytest.MonkeyPatch, trained: int | None, *, free: int = 100 * GIB, cap: int | None = None
    ) -> tuple[int | None, str | None]:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: LOADED)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 141 * GIB))
        monkeypatch.setattr(cache_room, "limit_of", lambda device: cap)
        model: Any = SimpleNamespace(
            device=torch.device("cuda"), dtype=BF16, shape=SimpleNamespace(sizes=LLAMA_2_7B),
            unwritten_bytes=lambda: BUFFER, cache_tokens=None,
        )  # fmt: skip
        note = limit_cache(model, trained)
        return model.cache_tokens, note

    def test_training_the_device_and_a_share_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trained = int(5.46 * GIB)
        tokens, note = self.limited(monkeypatch, trained)
        assert tokens == 2172
        assert note is not None
        assert "at most 2,172 tokens" in note
        assert "the adapter's training (5.46 GiB)" in note
        free = trained - LOADED  # what is free is beside what is loaded
        tokens, note = self.limited(monkeypatch, None, free=free)
        assert tokens == 2172
        assert note is not None
        assert "no more room on the GPU" in note
        assert self.limited(monkeypatch, 40 * GIB, free=free)[0] == 2172
        assert self.limited(monkeypatch, None, cap=trained + CUDA_CONTEXT_BYTES)[0] == 2172
        tokens, note = self.limited(monkeypatch, None)
        assert tokens is not None
        assert tokens > 100_000
        assert note is None

    def test_none_without_a_gpu(self, family_folder: Any) -> None:
        model = make_fast(family_folder("qwen 3"))
        assert limit_cache(model, 1) is None
        assert model.cache_tokens is None


@pytest.mark.parametrize(
    ("asked", "kept_to"),
    [
        ({}, 6 * GIB), ({"weights_policy": "stream"}, 6 * GIB), ({"quantization": "nf4"}, 6 * GIB),
        ({"weights_policy": "resident"}, None), ({"quantization": "none"}, None),
    ],
)  # fmt: skip
def test_a_session_keeps_to_what_training_took_unless_weights_are_held_otherwise(
    asked: dict[str, Any], kept_to: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_model_folder(tmp_path / "base")
    adapter = tiny.write_adapter(base, tmp_path / "adapter")
    save_base_record(BaseRecord(name=str(base), quantization="nf4"), adapter)
    (tmp_path / "result.json").write_text(json.dumps({"planned_peak_bytes": 1, "peak_bytes": 6 * GIB}))
    given = []

    def limit(model: Any, trained: int | None) -> str:
        given.append(trained)
        return "said"

    monkeypatch.setattr(session, "limit_cache", limit)
    opened = session.open_session(None, str(adapter), device="cpu", **asked)
    assert given == [kept_to]
    assert "said" in opened.notes

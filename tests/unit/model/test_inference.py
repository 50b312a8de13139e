"""Which engine answers, and that both answer the same through a session and through the command line."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models as tiny
from chulengo.cli.main import main
from chulengo.data.types import Message
from chulengo.errors import ConfigError
from chulengo.generate.engine import answer_all
from chulengo.generate.settings import GenerationSettings
from chulengo.model import inference
from chulengo.model.decode import cache_bytes
from chulengo.model.fast import load_fast
from chulengo.model.folder import read_config
from chulengo.model.inference import CACHE_TOKENS, choose_engine, weights_policy, why_not_fast
from chulengo.model.llama_shape import read_llama_shape
from chulengo.model.session import Session, open_session

ASKED: dict[str, Any] = {
    "quantization": "nf4", "compute_dtype": "auto", "attention": "sdpa", "device": "cpu", "adds_adapter": False,
}
CHATS = [[Message("user", text)] for text in ("Hello", "Where do guanacos live?", "Who spits?")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter")


def changed(adapter: Path, to: Path, **settings: Any) -> Path:
    to.mkdir()
    for file in adapter.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | settings))
    return to


class TestCoverage:
    def test_a_covered_model(self, base: Path, adapter: Path) -> None:
        config = read_config(base)
        for quantization in ("nf4", "none"):
            assert why_not_fast(config, adapter, **ASKED | {"quantization": quantization}) is None
        assert choose_engine("auto", None) == ("fast", None)
        assert choose_engine("reference", None) == ("reference", None)

    @pytest.mark.parametrize(
        ("asked", "says"),
        [
            ({"quantization": "fp4"}, "quantization is fp4"), ({"quantization": "int8"}, "quantization is int8"),
            ({"attention": "eager"}, "attention is eager"), ({"compute_dtype": "float16"}, "float16"),
            ({"adds_adapter": True}, "further adapter"),
        ],
    )  # fmt: skip
    def test_settings(self, base: Path, asked: dict[str, Any], says: str) -> None:
        assert says in str(why_not_fast(read_config(base), None, **ASKED | asked))

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"model_type": "gpt2"}, "'gpt2'"), ({"max_position_embeddings": None}, "how long"),
            ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, "stored as fp4"),
            ({"quantization_config": {"quant_method": "gptq"}}, "stored as gptq"),
            ({"model_type": "mistral", "sliding_window": 8}, "last 8 tokens"),
        ],
    )  # fmt: skip
    def test_models(self, base: Path, config: dict[str, Any], says: str) -> None:
        assert says in str(why_not_fast(read_config(base) | config, None, **ASKED))

    @pytest.mark.parametrize(
        "settings",
        [{"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}}],
    )
    def test_adapters(self, base: Path, adapter: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
        other = changed(adapter, tmp_path / "other", **settings)
        assert next(iter(settings)) in str(why_not_fast(read_config(base), other, **ASKED))

    def test_tensors_beside_the_maps(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        other = changed(adapter, tmp_path / "other")
        tensors = load_file(other / "adapter_model.safetensors")
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)
        save_file(tensors, other / "adapter_model.safetensors")
        assert "more than A and B" in str(why_not_fast(read_config(base), other, **ASKED))


@pytest.mark.parametrize(
    ("model", "adapts", "says"),
    [
        ({"head_dim": 12}, {}, "head size is 12"), ({}, {"r": 129}, "rank is 129"), ({}, {"r": 128}, None),
        ({}, {"r": 129, "lora_dropout": 0.1}, None), ({"intermediate_size": 124}, {}, "down_proj takes 124"),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_take(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any],
    adapts: dict[str, Any], says: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(inference, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(inference, "resolve_dtype", lambda name, place: torch.bfloat16)
    monkeypatch.setattr(inference.ops, "choose", lambda place: ("fused", "here"))
    other = changed(adapter, tmp_path / "other", **adapts)
    reason = why_not_fast(read_config(base) | model, other, **ASKED)
    assert (reason is None) if says is None else (says in str(reason))


def test_fast_insists_and_auto_says_why(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not cover this\..*eager"):
        open_session(str(base), device="cpu", engine="fast", attention="eager")
    session = open_session(str(base), device="cpu", attention="eager")
    assert session.engine == "reference"
    assert [note for note in session.notes if "model.attention is eager" in note and "engine: reference" in note]
    asked = open_session(str(base), device="cpu", engine="reference")
    assert (asked.engine, asked.notes) == ("reference", ())


def test_answers_are_not_in_fp8_and_that_is_said(base: Path) -> None:
    session = open_session(str(base), device="cpu", quantization="nf4", weights_policy="resident-fp8")
    assert "engine fast, resident weights" in session.describe()
    assert [note for note in session.notes if "resident-fp8 is for training" in note]
    assert open_session(str(base), device="cpu", quantization="nf4", weights_policy="resident").notes == ()


def answers(session: Session, side: str) -> list[tuple[tuple[int, ...], str]]:
    with session.side(side) as model:
        found = answer_all(model, session.renderer, CHATS, GenerationSettings(max_new_tokens=16), 2)
    return [(answer.ids, answer.finish_reason) for answer in found]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_both_engines_give_the_same_answers_on_both_sides(base: Path, adapter: Path, quantization: str) -> None:
    fast, reference = (
        open_session(None, str(adapter), device="cpu", quantization=quantization, engine=engine)
        for engine in ("auto", "reference")
    )
    assert (fast.engine, reference.engine) == ("fast", "reference")
    assert "engine fast, resident weights" in fast.describe()
    assert fast.encoder_decoder is False
    found = {side: answers(fast, side) for side in ("tuned", "base", "tuned")}
    assert found == {side: answers(reference, side) for side in ("tuned", "base")}
    assert found["tuned"] != found["base"]


def test_weights_are_resident_where_they_fit() -> None:
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    }
    shape, bf16 = read_llama_shape(config), torch.bfloat16
    assert cache_bytes(shape.sizes, bf16, CACHE_TOKENS) == 4 << 30
    # NF4 3.4, matrices 12.1, embeddings and head 0.5, cache 4.0 GiB
    assert weights_policy(shape, "nf4", bf16, int(20.2 * 2**30)) == "resident"
    assert weights_policy(shape, "nf4", bf16, int(19.8 * 2**30)) == "stream"
    assert weights_policy(shape, "none", bf16, 1 << 30) == "resident"


def test_answers_take_no_more_memory_than_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    }
    card = inference.device_memory("cpu")
    monkeypatch.setattr(inference, "device_memory", lambda device: replace(card, free_bytes=80 << 30))
    monkeypatch.setattr(inference, "resolve_device", torch.device)
    monkeypatch.setattr(inference, "resolve_dtype", lambda wanted, place: torch.bfloat16)
    adapter = tmp_path / "adapter"

    def chosen(wanted: str = "auto", device: str = "cuda", quantization: str = "nf4") -> tuple[str, str | None]:
        return inference.choose_weights(
            wanted, config, adapter, quantization=quantization, compute_dtype="auto", device=device
        )

    assert chosen() == ("resident", None)  # no run folder around it
    for text in ("{", "[]", '{"peak_bytes": 5}', '{"planned_peak_bytes": null, "peak_bytes": 5}'):
        (tmp_path / "result.json").write_text(text)
        assert chosen() == ("resident", None)
    (tmp_path / "result.json").write_text(f'{{"planned_peak_bytes": 1, "peak_bytes": {6 << 30}}}')
    policy, note = chosen()
    assert policy == "stream"
    assert note is not None
    assert "6.00 GiB" in note
    assert chosen("resident") == ("resident", None)
    assert chosen(quantization="none") == ("resident", None)
    assert chosen(device="cpu")[0] == "resident"
    (tmp_path / "result.json").write_text(f'{{"planned_peak_bytes": 1, "peak_bytes": {30 << 30}}}')
    assert chosen() == ("resident", None)


@pytest.mark.parametrize(("wanted", "found"), [("stream", "stream"), ("resident", "resident"), ("auto", "resident")])
def test_the_user_says_how_weights_are_held(base: Path, wanted: str, found: str) -> None:
    session = open_session(str(base), device="cpu", quantization="nf4", weights_policy=wanted)
    assert f"engine fast, {found} weights" in session.describe()
    plain = open_session(str(base), device="cpu", quantization="none", weights_policy=wanted)
    assert "engine fast, resident weights" in plain.describe()


def test_weights_that_are_not_quantised_are_there_once(base: Path) -> None:
    model = load_fast(base, quantization="none", device="cpu", weights="resident")
    model.logits([1, 2, 3])
    for group in model.weights.groups():
        ends = {weight.untyped_storage().data_ptr() for weight in group.weights if isinstance(weight, torch.Tensor)}
        assert len(ends) == 1
        assert group.resident_OI is None


@pytest.mark.parametrize("form", ["folded", "separate"])
def test_joined_weights_keep_the_adapter(base: Path, adapter: Path, form: str) -> None:
    model = load_fast(base, quantization="none", device="cpu", weights="resident")
    bare = model.logits([1, 2, 3])
    model.load_adapter(adapter, form=form)
    tuned = model.decoding().start([[1, 2, 3]])
    again = load_fast(base, quantization="none", device="cpu", weights="stream")
    again.load_adapter(adapter, form=form)
    assert torch.equal(tuned, again.decoding().start([[1, 2, 3]]))
    with model.disable_adapter():
        assert torch.equal(model.logits([1, 2, 3]), bare)


class TestCommands:
    def test_generate_both(self, adapter: Path, tmp_path: Path) -> None:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": chat[0].content}) + "\n" for chat in CHATS))
        rows: list[list[dict[str, Any]]] = []
        for engine in ("fast", "reference"):
            out = tmp_path / f"{engine}.jsonl"
            words = ["generate", "--adapter", adapter, "--both", "--prompts", file, "--out", out, "--device", "cpu",
                     "--max-new-tokens", 12, "--set", f"model.engine={engine}"]  # fmt: skip
            assert main([str(word) for word in words]) == 0
            rows.append([json.loads(line) for line in out.read_text().splitlines()])
            for row in rows[-1]:
                del row["seconds"], row["base"]["seconds"]
        assert len(rows[0]) >= len(CHATS)
        assert rows[0] == rows[1]

    def test_chat_both(
        self, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = []
        for engine in ("fast", "reference"):
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nWho spits?\n"))
            words = ["chat", "--adapter", adapter, "--both", "--device", "cpu", "--max-new-tokens", 8,
                     "--set", f"model.engine={engine}"]  # fmt: skip
            assert main([str(word) for word in words]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
        assert said[0].count("base>") == said[0].count("tuned>") == 2

    def test_an_engine_that_does_not_cover(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["generate", "--model", str(base), "--prompt", "a", "--device", "cpu", "--max-new-tokens", "2",
                 "--set", "model.attention=eager"]  # fmt: skip
        assert main(words) == 0
        assert capsys.readouterr().err.count("the fast one does not cover this") == 1
        assert main([*words, "--set", "model.engine=fast"]) == 2
        assert "model.engine is fast" in capsys.readouterr().err

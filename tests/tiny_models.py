"""Random models of a few thousand weights and a byte-wise renderer, for tests of the engine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chulengo.data.types import Message

NUM_BYTES = 256
BOS, EOS = 256, 257
VOCAB = 260


class ByteTokenizer:
    """A token a byte, so that a character outside ASCII is several tokens."""

    bos_id, eos_id, pad_id, vocab_size = BOS, EOS, None, VOCAB

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        return list(text.encode()), []

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < NUM_BYTES).decode(errors="replace")


class ByteRenderer:
    """`<bos>` and the contents, one after the other."""

    stop_ids = frozenset({EOS})
    tokenizer = ByteTokenizer()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [BOS, *"\n".join(f"{m.role[0]}:{m.content}" for m in messages).encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).strip()


def tiny_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        # wide weights: the likeliest token leads clearly, so equality of ids is a sharp test
        "initializer_range": 0.6, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.6,
                        bos_token_id=BOS, eos_token_id=EOS)
    return GPT2LMHeadModel(config).eval()


def tiny_mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                           sliding_window=8, initializer_range=0.6, bos_token_id=BOS, eos_token_id=EOS)
    return MistralForCausalLM(config).eval()


def tiny_bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.6,
                         bos_token_id=BOS, eos_token_id=EOS)
    return BloomForCausalLM(config).eval()


def tiny_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.6,
                         bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    return MambaForCausalLM(config).eval()


def tiny_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      initializer_factor=4.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=EOS)
    return T5ForConditionalGeneration(config).eval()


CORPUS = """Where do guanacos live? In the Andes. Who spits? Llamas do. What is a chulengo? A young guanaco.
Once upon a time there was a little llama. It was brown and liked the wind. Hello, how are you today?"""


def write_model_folder(folder: Path, **changes: Any) -> Path:
    """Writes a random Llama with a SentencePiece tokenizer of its own (byte fallback, as Llama 2's)."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS.splitlines()), model_writer=file, model_type="bpe", vocab_size=300,
            byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, add_dummy_prefix=True,
            remove_extra_whitespaces=False, normalization_rule_name="identity",
        )
    model = tiny_llama(vocab_size=300, bos_token_id=1, eos_token_id=2, **changes)
    model.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, *, name: str | None = None, style: str = "llama2", seed: int = 1) -> Path:
    """Writes an adapter for the base that changes its answers, with tokenizer and renderer."""
    from chulengo.data.renderer import Renderer, save_renderer
    from chulengo.data.tokenizer import load_tokenizer
    from chulengo.model.adapter import attach_lora, save_adapter
    from chulengo.model.load import load_base

    model = attach_lora(
        load_base(base, quantization="none", device="cpu", name=name or str(base)), rank=4, alpha=64.0, seed=seed
    )
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, folder)
    shutil.copy(base / "tokenizer.model", folder / "tokenizer.model")
    save_renderer(Renderer(load_tokenizer(folder), style=style), folder)
    return folder

"""Times one QLoRA training step of another library on the weights and tokens that `train_step.py` takes.

Each library in its own process, as its documentation uses it: 4-bit weights from a bitsandbytes checkpoint, LoRA of
the same rank on the same seven maps, bf16, bitsandbytes' paged 8-bit AdamW, gradients clipped at 1.

    python benchmarks/peers.py --make FOLDER --tokenizer FOLDER   # random weights, in bf16 and in NF4
    python benchmarks/peers.py --impl unsloth --model FOLDER/nf4 --recompute
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("transformers", "liger", "unsloth")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "torch")


def make(folder: Path, tokenizer: Path | None) -> None:
    """Writes random weights in bf16 to FOLDER/bf16 and as a bitsandbytes NF4 checkpoint to FOLDER/nf4."""
    import shutil

    import torch
    from train_step import SHAPES
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads = SHAPES["7b"]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "bf16")
    torch.set_default_dtype(torch.float32)
    del model
    torch.cuda.empty_cache()
    model = AutoModelForCausalLM.from_pretrained(
        folder / "bf16", dtype=torch.bfloat16, device_map={"": 0}, quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )  # fmt: skip
    model.save_pretrained(folder / "nf4")
    for kind in ("bf16", "nf4"):
        for file in tokenizer.iterdir() if tokenizer else ():
            shutil.copy(file, folder / kind)


def build(arguments: argparse.Namespace) -> Any:
    """Returns the library's model, ready to train."""
    if arguments.impl == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=arguments.model, max_seq_length=max(arguments.seq, 2048), load_in_4bit=True
        )
        return FastLanguageModel.get_peft_model(
            model, r=arguments.rank, target_modules=TARGETS, lora_alpha=arguments.rank, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth" if arguments.recompute else False, random_state=0,
            max_seq_length=max(arguments.seq, 2048),
        )  # fmt: skip
    if arguments.impl == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=arguments.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    return get_peft_model(model, LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=TARGETS,
                                            task_type="CAUSAL_LM"))  # fmt: skip


def main() -> None:
    """Makes weights, or runs one library once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--tokenizer", type=Path, help="with --make: tokenizer files that some libraries ask for")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS)
    parser.add_argument("--model")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", help="append the row to this file")
    parser.set_defaults(device="cuda")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.tokenizer)
        return
    model = build(arguments)  # first: unsloth has to be imported before transformers
    import bitsandbytes
    import torch
    from train_step import full_inputs, timed

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-4)
    inputs = full_inputs(arguments.batch, arguments.seq, 32000, torch.device("cuda"), 1.0)
    ids = inputs.ids_T.view(arguments.batch, arguments.seq)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    installed = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    row = {
        "engine": arguments.impl, "shape": "7b", "batch": arguments.batch, "seq": arguments.seq,
        "rank": arguments.rank, "recompute": arguments.recompute, "optimizer": "paged_adamw_8bit",
        **timed(step, arguments, reset_after=arguments.warm), "versions": installed,
    }  # fmt: skip
    print("ROW", json.dumps(row), flush=True)
    if arguments.out:
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()

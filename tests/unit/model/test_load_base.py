from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chulengo.errors import ConfigError, ModelError
from chulengo.model.load import import_bitsandbytes, load_base, quiet_libraries, resolve_device, resolve_dtype
from training_kit import VOCAB, make_llama, make_t5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize(
    ("quantization", "layer"),
    [("nf4", "Linear4bit"), ("fp4", "Linear4bit"), ("int8", "Linear8bitLt"), ("none", "Linear")],
)
def test_each_quantisation_on_a_cpu(llama: Path, quantization: str, layer: str) -> None:
    exact = load_file(llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    model = load_base(llama, quantization=quantization, device="cpu")
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj).__name__ == layer
    assert type(model.lm_head).__name__ == "Linear"
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    # relative error of one matrix, read out through its layer; NF4 has 0.09 on normal weights (Dettmers et al. 2023)
    weight = attention.q_proj(torch.eye(64)).T
    error = float((weight - exact).norm() / exact.norm())
    low, high = {"nf4": (0.08, 0.11), "fp4": (0.11, 0.18), "int8": (1e-3, 0.02), "none": (0.0, 0.0)}[quantization]
    assert low <= error <= high
    if quantization in ("nf4", "fp4"):
        assert attention.q_proj.weight.quant_type == quantization
        assert attention.q_proj.weight.quant_state.nested


def test_single_quantisation(llama: Path) -> None:
    model = load_base(llama, double_quant=False, device="cpu")
    assert not model.model.layers[0].self_attn.q_proj.weight.quant_state.nested


def test_4bit_numbers_are_the_same_in_training_and_evaluation_mode(llama: Path) -> None:
    # bitsandbytes repacks weights in evaluation mode on CPUs with AVX512-BF16: other numbers, and no backward pass
    model = load_base(llama, device="cpu")
    with torch.no_grad():
        evaluation = model.eval()(IDS).logits
        training = model.train()(IDS).logits
    assert torch.equal(evaluation, training)
    inputs = model.get_input_embeddings()(IDS).requires_grad_(True)
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.any()


def test_outputs_not_divisible_by_32(tmp_path: Path) -> None:
    model = load_base(make_llama(tmp_path, intermediate_size=100), device="cpu")
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    model = load_base(make_llama(tmp_path, tied=True), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_encoder_decoder(tmp_path: Path) -> None:
    model = load_base(make_t5(tmp_path), device="cpu")
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert model(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits.shape == (1, 3, VOCAB)


def test_name_is_the_users(llama: Path) -> None:
    assert load_base(llama, quantization="none", device="cpu", name="org/model").name_or_path == "org/model"


def test_weights_that_lack_a_tensor(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ModelError, match=r"lack 1 tensor.*up_proj"):
        load_base(tmp_path, quantization="none", device="cpu")


def test_weights_of_another_shape(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="llama"):
        load_base(tmp_path, quantization="none", device="cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no-such-architecture"}, "no-such-architecture"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Mine"}}, "never run"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantised"),
    ],
)
def test_models_that_are_refused(llama: Path, tmp_path: Path, changes: dict, says: str) -> None:
    config = json.loads((llama / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=says):
        load_base(tmp_path, quantization="none", device="cpu")


def test_tokenizer_with_more_ids_than_embeddings(llama: Path) -> None:
    load_base(llama, device="cpu", vocab_size=VOCAB)
    with pytest.raises(ModelError, match="do not belong together"):
        load_base(llama, device="cpu", vocab_size=VOCAB + 1)


def test_devices_and_dtypes() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ConfigError, match="float16"):
        resolve_dtype("half", torch.device("cpu"))
    for wrong in ("gpu", "cuda:", "cuda:x", "mps"):
        with pytest.raises(ConfigError):
            resolve_device(wrong)
    with pytest.raises(ConfigError, match=r"model\.device=cpu"):
        resolve_device("cuda:99")


def test_bitsandbytes_is_imported_without_the_hub_kernels_package(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('the package kernels was imported')")
    code = (
        "import sys\nfrom chulengo.model.load import import_bitsandbytes\nimport_bitsandbytes()\n"
        "assert 'bitsandbytes' in sys.modules and 'kernels' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout + done.stderr == ""


def test_libraries_are_quiet_inside_and_as_before_outside(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as library

    library.set_verbosity_info()
    library.enable_progress_bar()
    level = logging.getLogger("bitsandbytes").level
    capfd.readouterr()
    load_base(llama, device="cpu")
    with quiet_libraries():
        warnings.warn_explicit("gone", FutureWarning, "x.py", 1, module="transformers.trainer")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert library.get_verbosity() == library.INFO
    assert library.is_progress_bar_enabled()
    assert logging.getLogger("bitsandbytes").level == level
    library.set_verbosity_warning()


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_widths_that_the_4_bit_kernel_gets_wrong_are_refused(tmp_path: Path, quantization: str) -> None:
    folder = make_llama(tmp_path / "m", intermediate_size=96)
    import_bitsandbytes()
    import bitsandbytes

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=quantization)
    if float((bitsandbytes.functional.dequantize_4bit(codes, state) - weight).norm() / weight.norm()) < 0.2:
        load_base(folder, quantization=quantization, device="cpu")  # a bitsandbytes that has mended it
        return
    with pytest.raises(ConfigError, match="rows of 96 values"):
        load_base(folder, quantization=quantization, device="cpu")
    load_base(folder, quantization="none", device="cpu")

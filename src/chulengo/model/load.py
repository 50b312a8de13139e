"""A checked folder to a frozen model on its device: NF4, FP4, int8 or unquantised.

What has which dtype. Quantised linear layers hold 4- or 8-bit codes and multiply in `compute_dtype`; everything else
(embeddings, norms, the head, biases) is held in `compute_dtype`. Nothing is upcast: peft's
`prepare_model_for_kbit_training` would turn embeddings, norms and head into fp32, which is 0.5 GB for Llama 2 7B and
buys nothing there, since transformers' RMSNorm computes in fp32 inside and the loss takes its logits in fp32. The head
is not quantised (bitsandbytes' rule), nor are embeddings; with a tied head the two stay one tensor.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward pass in evaluation mode. The
repacked form multiplies in bf16 whatever the compute dtype, has no backward pass (a training step after an evaluation
would lose the gradient of every layer below, in silence), and fails outright when the number of outputs is no multiple
of 32. `load_base` switches it off per layer, so that training, evaluation and generation compute the same numbers.

Only safetensors are read and no code of a model is ever run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chulengo.data.wording import counted
from chulengo.errors import ConfigError, DoesNotFitError, MissingPackageError, ModelError, require
from chulengo.model.folder import is_encoder_decoder, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUIET_MODULES = r"(transformers|peft|accelerate|bitsandbytes|torch\.optim|torch\.utils\.checkpoint)\b"


def load_base(
    folder: Path, *, quantization: str = "nf4", double_quant: bool = True, compute_dtype: str = "auto",
    device: str = "auto", attention: str = "sdpa", name: str | None = None, vocab_size: int | None = None,
) -> Any:
    """Returns the model of a folder, all parameters frozen, in evaluation mode, on its device.

    Args:
        folder: as `model.folder.resolve_model` returns it.
        quantization: nf4, fp4, int8 or none.
        double_quant: quantise the 4-bit block scales too.
        compute_dtype: float32, bfloat16, float16 or auto (bfloat16 on a GPU that has it, float16 on one that has not,
            float32 on a CPU).
        device: cpu, cuda, cuda:N or auto (this process's GPU when there is one).
        attention: sdpa, eager or flash_attention_2.
        name: the name the user gave, which adapters record as their base; None: the folder.
        vocab_size: ids the tokenizer can produce; checked against the embeddings.

    Returns:
        transformers.PreTrainedModel: causal or encoder-decoder, as the config says.

    Raises:
        ModelError: the weights do not fit the config, the architecture is unknown, or ids would lie outside.
        ConfigError: a setting that this machine or model cannot have.
        DoesNotFitError: the device has not enough memory.
    """
    import_bitsandbytes(required=quantization != "none")
    import transformers

    config = read_config(folder)
    place = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, place)
    quantizer = _quantizer(config, quantization, double_quant, dtype)
    if attention == "flash_attention_2":
        require("flash_attn", "gpu")
    auto = transformers.AutoModelForSeq2SeqLM if is_encoder_decoder(config) else transformers.AutoModelForCausalLM
    try:
        with quiet_libraries():
            model, info = auto.from_pretrained(
                str(folder), quantization_config=quantizer, dtype=dtype, device_map={"": str(place)},
                attn_implementation=attention, use_safetensors=True, local_files_only=True, trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"The weights of {name or folder} do not fit on {place}.",
            next_step="--set model.quantization=nf4, a smaller model, or: chulengo plan",
        ) from error
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise _explained(error, name or str(folder), config, attention) from error
    _check_loaded(info, folder)
    if vocab_size is not None:
        check_vocabulary(model, vocab_size)
    _keep_one_kernel(model)
    if quantization in ("nf4", "fp4"):
        _check_dequantisation(model, quantization)
    model.requires_grad_(False)
    model.eval()
    model.name_or_path = model.config.name_or_path = name or str(folder)
    return model


def resolve_device(device: str) -> torch.device:
    """Returns the device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Under torchrun, `auto` and `cuda` are the GPU of this process's local rank.

    Raises:
        ConfigError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    kind, _, index = device.partition(":")
    if device != "auto" and (kind != "cuda" or not (index.isdigit() or (not index and ":" not in device))):
        raise ConfigError(
            f"model.device is {device!r}.", allowed="auto, cpu, cuda, cuda:N", next_step="--set model.device=auto"
        )
    number = int(index) if index else int(os.environ.get("LOCAL_RANK", "0"))
    if number >= count:
        raise ConfigError(
            f"model.device is {device!r}, but this machine has {counted(count, 'CUDA device')} that torch can use.",
            next_step="--set model.device=cpu, or: chulengo doctor",
        )
    return torch.device("cuda", number)


def resolve_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """Returns the dtype that a compute_dtype setting means on a device.

    Raises:
        ConfigError: the name is unknown, or the device cannot do bfloat16.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.get_device_capability(device)[0] >= 8
    if compute_dtype == "auto":
        if not on_gpu:
            return torch.float32
        return torch.bfloat16 if has_bf16 else torch.float16
    if compute_dtype not in DTYPES:
        raise ConfigError(f"model.compute_dtype is {compute_dtype!r}.", allowed=", ".join(["auto", *DTYPES]))
    if compute_dtype == "bfloat16" and not has_bf16:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16.", next_step="model.compute_dtype=float16"
        )
    return DTYPES[compute_dtype]


def use_threads(count: int | None) -> None:
    """Sets how many threads this process's CPU products use; None leaves PyTorch's choice."""
    if count is not None:
        torch.set_num_threads(count)


def check_vocabulary(model: Any, vocab_size: int) -> None:
    """Raises `ModelError` when the tokenizer can produce ids for which the model has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ModelError(
            f"The tokenizer has {vocab_size:,} ids but the model embeds {rows:,}: they do not belong together.",
            next_step="use the tokenizer files that came with these weights",
        )


def import_bitsandbytes(*, required: bool = True) -> None:
    """Imports bitsandbytes without its look at the Hub.

    On CPUs with AVX512-BF16 its import downloads and runs a compiled kernel from the Hub when the package `kernels` is
    installed, and prints a line when it is not. That kernel serves the repacked weights which `load_base` switches off,
    so it would be of no use. transformers' trainer and peft import bitsandbytes too: this has to come before them.

    Args:
        required: False: unquantised weights do without, so that its absence is no error.

    Raises:
        MissingPackageError: it is required and not installed.
    """
    if "bitsandbytes" in sys.modules:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        if required:
            raise MissingPackageError(
                "Quantised weights need the package 'bitsandbytes', which is not installed.",
                next_step="pip install bitsandbytes, or --set model.quantization=none",
            )
        return
    absent = object()
    before = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        with quiet_libraries():
            importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        if before is not absent:
            sys.modules["kernels"] = before  # type: ignore[assignment]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences progress bars, log lines and deprecation notes of the libraries, and restores all of it afterwards.

    Errors still come through. What a user must know is said by us, once, where it is decided.
    """
    from transformers.utils import logging as library_logging

    verbosity = library_logging.get_verbosity()
    had_bar = library_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "accelerate", "peft", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, UserWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=QUIET_MODULES)
            yield
    finally:
        library_logging.set_verbosity(verbosity)
        if had_bar:
            library_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _quantizer(config: dict[str, Any], quantization: str, double_quant: bool, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    stored = config.get("quantization_config")
    if isinstance(stored, dict):
        method = stored.get("quant_method", "an unnamed method")
        kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type")
        if method != "bitsandbytes" or kind != quantization:
            raise ModelError(
                f"The weights are already quantised ({method}{f', {kind}' if kind else ''}).",
                allowed="16- or 32-bit weights, which Chulengo quantises itself",
                next_step="use the original model"
                + (f", or --set model.quantization={kind}" if method == "bitsandbytes" else ""),
            )
        return None
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization not in ("nf4", "fp4"):
        raise ConfigError(f"model.quantization is {quantization!r}.", allowed="nf4, fp4, int8, none")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_one_kernel(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            # LLM.int8() multiplies in fp16 whatever comes in, and says so once for every layer and call
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _check_dequantisation(model: Any, quantization: str) -> None:
    """Raises `ConfigError` when this machine's 4-bit kernel does not give back rows of the model's lengths.

    Measured on bitsandbytes 0.50.2's CPU kernel: relative error of an NF4 weight 0.24 to 0.40 for rows of 32, 80, 96,
    160 or 224 values, where 0.09 is NF4's own; multiples of 64 are right. So every other length is tried.
    """
    import bitsandbytes as bnb

    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    devices = {module.in_features: module.weight.device for module in layers if module.in_features % 64}
    for length, device in devices.items():
        errors = []
        for columns in (64, length):
            weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0)).to(device)
            codes, state = bnb.functional.quantize_4bit(weight, quant_type=quantization)
            errors.append(float((bnb.functional.dequantize_4bit(codes, state) - weight).norm() / weight.norm()))
        if errors[1] > 1.5 * errors[0]:
            raise ConfigError(
                f"bitsandbytes cannot hold this model in {quantization} on {device.type}: rows of {length} "
                f"values come back with a relative error of {errors[1]:.2f}, where {errors[0]:.2f} is to be expected.",
                allowed="models whose layer widths are multiples of 64",
                next_step="--set model.quantization=none, or a GPU",
            )


def _check_loaded(info: dict[str, Any], folder: Path) -> None:
    # transformers fills tensors that the file lacks with random numbers and goes on
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have other shapes for")):
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(key, ()))
        if names:
            raise ModelError(
                f"The weights in {folder} {what} {counted(len(names), 'tensor')} of this architecture: "
                f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}.",
                next_step="check that config.json and the weights belong together",
            )


def _explained(error: Exception, name: str, config: dict[str, Any], attention: str) -> ModelError | ConfigError:
    text = str(error).strip()
    first = text.split("\n")[0][:300]
    if "auto_map" in config or "trust_remote_code" in text:
        return ModelError(
            f"{name} needs code that comes with the model, which is never run.",
            allowed="architectures that transformers itself has",
            next_step="--model nano, or another model",
        )
    if "ignore_mismatched_sizes" in text:  # transformers prints which ones into a log that we silence
        return ModelError(
            f"The weights of {name} do not have the shapes that its config.json ({config['model_type']}) describes.",
            next_step="copy config.json and the weights again, from one place",
        )
    if "model type" in text and "does not recognize" in text:
        return ModelError(
            f"{name} has the architecture {config['model_type']!r}, which transformers does not know.",
            allowed="the architectures of the installed transformers",
            next_step="check model_type in config.json, or pip install -U transformers",
        )
    if "attn_implementation" in text or "does not support" in text:
        return ConfigError(
            f"{config['model_type']} cannot use attention {attention!r}: {first}", next_step="model.attention=eager"
        )
    return ModelError(
        f"{name} ({config['model_type']}) cannot be loaded: {first}", next_step="copy or download the model again"
    )

"""The trainable part: LoRA by PEFT, in PEFT's own files.

Dtypes. PEFT holds LoRA matrices in fp32 whatever the base has (its `autocast_adapter_dtype`), and so must whatever is
trained in full: a bf16 weight with a learning rate of 2e-4 rounds most AdamW updates away. A fully trained head or
embedding is therefore fp32 while it is trained under autocast (`trainable_in_fp32`) and returns to the base's dtype
afterwards, which is the dtype in which everybody else loads it. Nothing else changes its dtype.

Gradient checkpointing is set explicitly and non-reentrant: the reentrant form gives no gradient when the inputs need
none (a frozen embedding), which others patch with `enable_input_require_grads`.

Tied models have one matrix for embeddings and head. Training either trains that matrix: PEFT's `ensure_weight_tying`
keeps one trainable copy for both.

Encoder-decoder models have one matrix under three names or four: `shared`, the encoder's and the decoder's embeddings,
and in T5 (not in Flan-T5) the head. It is trained as one here too, but not by `ensure_weight_tying`: PEFT ties by the
architecture's class, and would make the untied head of Flan-T5 a copy of the embeddings. So every module that holds the
matrix is listed in `modules_to_save`, PEFT copies each, and the copies are made one parameter afterwards. The file has
the matrix once for each of its names, so that plain PEFT, which ties nothing then, computes the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chulengo.data.wording import counted
from chulengo.errors import ConfigError, ModelError, nearest
from chulengo.model.load import quiet_libraries

ALL_LINEAR = "all-linear"


def attach_lora(
    model: Any, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = (ALL_LINEAR,),
    rslora: bool = False, dora: bool = False, train_head: bool = False, train_embeddings: bool = False, seed: int = 0,
) -> Any:
    """Returns the model with a fresh LoRA adapter, the only trainable part.

    Args:
        model: as `model.load.load_base` returns it; it is wrapped in place.
        rank: LoRA rank.
        alpha: scale; the update is multiplied by alpha / rank, or alpha / sqrt(rank) with `rslora`.
        dropout: of the adapter's input.
        targets: names of linear modules (`q_proj`), or `all-linear`: every one except the head.
        rslora: rank-stabilised scale (Kalajdzievski 2023).
        dora: weight-decomposed LoRA (Liu et al. 2024).
        train_head: train and save the head in full; where it is tied to the embeddings, both.
        train_embeddings: train and save the input embeddings in full: the encoder's and the decoder's as one matrix.
        seed: of the initialisation; the global random state is left as it was.

    Returns:
        peft.PeftModel.

    Raises:
        ConfigError: a target that the model does not have, or a combination that PEFT cannot do.
    """
    import peft

    names = linear_names(model)
    chosen = _targets(targets, names)
    full = _full_modules(model, train_head, train_embeddings)
    tied = bool(full) and _is_tied(model) and not model.config.is_encoder_decoder
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, use_rslora=rslora, use_dora=dora,
        modules_to_save=full or None, ensure_weight_tying=tied, bias="none",
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(model, config)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"PEFT cannot attach this adapter: {str(error).splitlines()[0]}",
            next_step="lora.dora=false, or other lora.targets",
        ) from error
    _join_copies(wrapped)
    return wrapped


def fully_trained(model: Any) -> str | None:
    """Returns what is trained in full beside the adapter, in words for the user; None when nothing is."""
    from peft.utils import ModulesToSaveWrapper

    names: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                names.setdefault(id(copy.weight), []).append(path)
                sizes[id(copy.weight)] = copy.weight.numel()
    if not names:
        return None
    parts = [" = ".join(paths) + f" ({counted(sizes[key], 'weight')})" for key, paths in names.items()]
    return "Trained in full: " + "; ".join(parts)


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """Returns the base model with the adapter of a folder.

    Raises:
        ModelError: the folder holds no adapter, a broken one, or one for another model.
    """
    import peft
    from safetensors import SafetensorError

    if not (folder / "adapter_config.json").is_file():
        what = "is a model, not an adapter" if (folder / "config.json").is_file() else "has no adapter_config.json"
        raise ModelError(
            f"{folder} {what}.", allowed="a folder with adapter_config.json and adapter_model.safetensors",
            next_step="give the run's adapter folder: RUN/adapter",
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors.", next_step="copy the adapter again")
    try:
        with quiet_libraries():
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model: {str(error).splitlines()[0][:300]}",
            next_step="give the base model that the adapter was trained on (adapter_config.json names it)",
        ) from error
    _join_copies(wrapped)
    wrapped.train(trainable)
    return wrapped


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter in PEFT's files: adapter_config.json and adapter_model.safetensors.

    `base_model_name_or_path` is the name the base was loaded under. No network: PEFT's default would ask the Hub
    whether the base's vocabulary was resized, which ours never is.
    """
    for config in model.peft_config.values():
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
    with quiet_libraries():
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def restore_adapter(model: Any, folder: Path) -> None:
    """Puts the weights that `save_adapter` wrote back into the same adapter, bit for bit.

    Raises:
        ModelError: the file's tensors are not those of this adapter.
    """
    import peft
    from safetensors.torch import load_file

    state = load_file(str(folder / "adapter_model.safetensors"))
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    names = own.keys() | state.keys()
    different = [k for k in names if k not in own or k not in state or own[k].shape != state[k].shape]
    # two names of one tied tensor: save_pretrained writes it once
    different = [k for k in different if not (k in own and k not in state and _has_twin(own, k))]
    if different:
        raise ModelError(
            f"{folder} holds another adapter: {counted(len(different), 'tensor differs', 'tensors differ')}, such as "
            f"{sorted(different)[0]}.",
            next_step="resume with the model and the lora settings the run was started with",
        )
    with quiet_libraries():
        peft.set_peft_model_state_dict(model, state)


def enable_gradient_checkpointing(model: Any) -> None:
    """Makes the backward pass recompute each layer's activations, the same numbers in less memory and more time.

    Raises:
        ConfigError: the architecture cannot.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers 5.23 renamed it and deprecates the old name; 5.17 has the old one only
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    try:
        with quiet_libraries():
            enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"{type(base).__name__} cannot recompute activations.", next_step="training.gradient_checkpointing=false"
        ) from error


@contextlib.contextmanager
def trainable_in_fp32(model: nn.Module) -> Iterator[None]:
    """Holds all trainable parameters in fp32 inside the block and gives them their own dtype back after it."""
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [p.dtype for p in narrow]
    for p in narrow:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in zip(narrow, dtypes, strict=True):
            p.data = p.data.to(dtype)
            p.grad = None


def linear_names(model: Any) -> list[str]:
    """Returns the names (last component) of the linear modules that can take an adapter, the head last."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found: dict[str, None] = {}
    last = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            name = path.rsplit(".", 1)[-1]
            if module is head:
                last.append(name)
            else:
                found[name] = None
    return [*found, *(name for name in last if name not in found)]


def _targets(targets: Sequence[str], names: list[str]) -> str | list[str]:
    if tuple(targets) == (ALL_LINEAR,):
        return ALL_LINEAR
    if not targets or ALL_LINEAR in targets:
        raise ConfigError(
            f"lora.targets is {list(targets)}.", allowed=f"[{ALL_LINEAR}] alone, or module names: {', '.join(names)}"
        )
    unknown = [t for t in targets if t.rsplit(".", 1)[-1] not in names]
    if unknown:
        close = nearest(unknown[0], names)
        raise ConfigError(
            f"lora.targets names {', '.join(unknown)}, which this model does not have.",
            allowed=f"{ALL_LINEAR}, {', '.join(names)}",
            next_step=f"lora.targets=[{close}]" if close else f"lora.targets=[{ALL_LINEAR}]",
        )
    return list(targets)


def _full_modules(model: Any, train_head: bool, train_embeddings: bool) -> list[str]:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if train_head and head is None:
        raise ConfigError(f"{type(model).__name__} has no separate head to train.", next_step="lora.train_head=false")
    wanted = [embeddings] if train_embeddings or (train_head and _is_tied(model)) else []
    wanted += [head] if train_head and not _is_tied(model) else []
    names = []
    for path, module in model.named_modules():
        if model.config.is_encoder_decoder:  # paths in full: T5 has two modules of the name embed_tokens
            if any(getattr(module, "weight", None) is each.weight for each in wanted):
                names.append(path)
        elif any(module is each for each in wanted):
            names.append(path.rsplit(".", 1)[-1])
    return names


def _join_copies(model: Any) -> None:
    """Makes one parameter of the trained copies that stand for one of the base's matrices and are still equal."""
    from peft.utils import ModulesToSaveWrapper

    first: dict[tuple[int, str], Any] = {}
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for name, copy in module.modules_to_save.items():
            one = first.setdefault((id(module.original_module.weight), name), copy)
            if one is not copy and torch.equal(one.weight, copy.weight):
                copy.weight = one.weight


def _is_tied(model: Any) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def _has_twin(state: dict[str, torch.Tensor], key: str) -> bool:
    return any(k != key and v.data_ptr() == state[key].data_ptr() for k, v in state.items())

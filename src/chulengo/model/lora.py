"""LoRA on the fast engine's linear maps (https://arxiv.org/abs/2106.09685), with PEFT's files in and out.

The files are PEFT's: `adapter_config.json` is written by PEFT's own `LoraConfig` (targets by their short names),
tensors have the names that PEFT gives them on the Hugging Face model, so an adapter moves between the engines,
and to everybody else, without conversion. The initial values too: one seed gives both engines the same A, bit for bit.

A and B are float32, whatever the compute dtype, as PEFT holds them: a bf16 weight with a learning rate of 2e-4 rounds
most AdamW updates away.

What PEFT can and this cannot (adapters of embeddings, several ranks in one adapter, …) is an error that names
the reference engine; a setting of an adapter file that is not known to be harmless is one too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chulengo.errors import ConfigError, ModelError
from chulengo.model.linear_group import Factors, LinearGroup, LoraForm
from chulengo.model.llama_shape import refuse
from chulengo.model.load import import_bitsandbytes, quiet_libraries
from chulengo.model.lora_settings import LoraSettings
from chulengo.model.plan_shapes import LINEAR_NAMES

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FORMS = ("auto", "folded", "separate")
MAGNITUDE = "lora_magnitude_vector"  # PEFT's files have it without the `.weight` of its module

# settings of adapter_config.json that are read here, or that change nothing once the adapter is written
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora",
        "init_lora_weights")  # fmt: skip
HARMLESS = (
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "layers_pattern", "ensure_weight_tying",
)  # fmt: skip
# others say how A and B began by changing the base weights, which the adapter file does not hold
PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal")


def attach_fresh(groups: Sequence[LinearGroup], settings: LoraSettings, *, device: torch.device) -> None:
    """Gives every targeted map a new A and B, both 0, the only parameters that are trained; `draw_fresh` is to follow.

    Args:
        groups: all maps of the model, in order.
        settings: of the adapter.
        device: where A and B go.
    """
    rank = settings.rank
    for group in groups:
        for index, (name, width) in enumerate(zip(group.names, group.widths, strict=True)):
            group.factors[index] = None
            if name.rsplit(".", 1)[-1] not in settings.targets:
                continue
            a_RI, b_OR = (
                nn.Parameter(torch.zeros(shape, device=device)) for shape in ((rank, group.in_features), (width, rank))
            )
            # `FastModel` puts the norms of W there
            magnitude_O = nn.Parameter(torch.ones(width, device=device)) if settings.dora else None
            group.factors[index] = Factors(a_RI, b_OR, magnitude_O)


def draw_fresh(groups: Sequence[LinearGroup], seed: int) -> None:
    """Gives the A of a fresh adapter their first values, the same as PEFT's with this seed.

    Rank 64 on all maps of Llama 2 7B are 233 million numbers, 0.8 s of one core, in which Python's lock is free.
    """
    generator = torch.Generator().manual_seed(seed)
    for pair in (pair for group in groups for pair in group.factors if pair is not None):
        a_RI = torch.empty(pair.a_RI.shape)
        # PEFT makes two linear layers, each with values of its own, and then draws A again
        for each in (a_RI, torch.empty(pair.b_OR.numel())):
            each.uniform_(generator=generator)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        pair.a_RI.data.copy_(a_RI)


def named_factors(groups: Sequence[LinearGroup]) -> dict[str, nn.Parameter]:
    """Returns the factors of every adapted map under the names that PEFT's files have for them."""
    found: dict[str, nn.Parameter] = {}
    for group in groups:
        for name, pair in zip(group.names, group.factors, strict=True):
            if pair is not None:
                found[f"{PREFIX}{name}.lora_A.weight"] = pair.a_RI
                found[f"{PREFIX}{name}.lora_B.weight"] = pair.b_OR
                if pair.magnitude_O is not None:
                    found[f"{PREFIX}{name}.{MAGNITUDE}"] = pair.magnitude_O
    return found


def read_adapter(
    groups: Sequence[LinearGroup], folder: Path, *, device: torch.device, trainable: bool
) -> LoraSettings:
    """Returns the settings of a PEFT adapter after giving its values to the maps it is for.

    Raises:
        ModelError: no adapter, one of another model, or one with a part that the fast engine does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _read_settings(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}.", next_step="copy the adapter again")
    try:
        stored = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}", next_step="copy the adapter again") from error
    expected = _expected_shapes(groups, settings)
    wrong = [name for name in expected.keys() | stored.keys()
             if name not in expected or name not in stored or tuple(stored[name].shape) != expected[name]]  # fmt: skip
    if wrong:
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model: {len(wrong)} tensors differ, such as "
            f"{sorted(wrong)[0]}.",
            next_step="give the base model that the adapter was trained on (adapter_config.json names it)",
        )
    for group in groups:
        for index, name in enumerate(group.names):
            keys = [f"{PREFIX}{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", MAGNITUDE)]
            if keys[0] in stored:
                a_RI, b_OR, magnitude_O = stored[keys[0]], stored[keys[1]], stored.get(keys[2])
                group.factors[index] = _factors(a_RI, b_OR, magnitude_O, device, trainable=trainable)
            else:
                group.factors[index] = None
    return settings


def write_adapter(
    groups: Sequence[LinearGroup], settings: LoraSettings, folder: Path, *, base_name: str
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does.

    Args:
        groups: all maps of the model.
        settings: of the adapter.
        folder: made if it is not there.
        base_name: of the base model, for `base_model_name_or_path`.
    """
    import_bitsandbytes(required=False)  # with care, before peft imports it
    import peft
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        config = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, use_rslora=settings.rslora,
            use_dora=settings.dora, target_modules=sorted(settings.targets), bias="none", task_type="CAUSAL_LM",
            inference_mode=True, base_model_name_or_path=base_name,
        )  # fmt: skip
        config.target_modules = sorted(settings.targets)  # PEFT makes a set of it, whose order changes
        config.save_pretrained(str(folder))
    tensors = {name: value.detach().cpu().contiguous() for name, value in named_factors(groups).items()}
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def adapter_settings(folder: Path) -> LoraSettings:
    """Returns the settings of a PEFT adapter, of which only the configuration is read.

    Raises:
        ModelError: no adapter, or one with a part that the fast engine does not have.
    """
    return _read_settings(folder)


def _read_settings(folder: Path) -> LoraSettings:
    file = folder / CONFIG_FILE
    if not file.is_file():
        what = "is a model, not an adapter" if (folder / "config.json").is_file() else f"has no {CONFIG_FILE}"
        raise ModelError(
            f"{folder} {what}.", allowed=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            next_step="give the run's adapter folder: RUN/adapter",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}", next_step="copy the adapter again") from error
    _check_known(config, folder)
    targets = config.get("target_modules")
    # names, or (PEFT 0.21.2 for all-linear) the paths of the modules; a layer left out shows in the tensors' names
    names = {str(target).rsplit(".", 1)[-1] for target in targets} if isinstance(targets, list) else set()
    if not names or not names <= set(LINEAR_NAMES):
        raise refuse(f"The adapter in {folder} has the targets {targets}.", allowed=", ".join(LINEAR_NAMES))
    return LoraSettings(
        int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0.0)),
        tuple(name for name in LINEAR_NAMES if name in names), bool(config.get("use_rslora", False)),
        bool(config.get("use_dora", False)),
    )


def _check_known(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise refuse(f"The adapter in {folder} is of type {config.get('peft_type')}.", allowed="LORA")
    if config.get("init_lora_weights", True) not in PLAIN_BEGINNINGS:
        raise refuse(f"The adapter in {folder} began with init_lora_weights={config['init_lora_weights']!r}.")
    # anything else must be off: a setting that came after this was written may change what is computed
    for name, value in config.items():
        if name not in READ and name not in HARMLESS and value not in (None, False, "none", [], {}):
            raise refuse(f"The adapter in {folder} has {name}={value!r}, which the fast engine does not have.")


def _expected_shapes(groups: Sequence[LinearGroup], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for name, width in zip(group.names, group.widths, strict=True):
            if name.rsplit(".", 1)[-1] in settings.targets:
                shapes[f"{PREFIX}{name}.lora_A.weight"] = (settings.rank, group.in_features)
                shapes[f"{PREFIX}{name}.lora_B.weight"] = (width, settings.rank)
                if settings.dora:
                    shapes[f"{PREFIX}{name}.{MAGNITUDE}"] = (width,)
    return shapes


def _factors(
    a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor | None, device: torch.device, *, trainable: bool
) -> Factors:
    def own(x: Tensor) -> nn.Parameter:
        values = x.detach().to(device=device, dtype=torch.float32, copy=True)
        return nn.Parameter(values, requires_grad=trainable)

    return Factors(own(a_RI), own(b_OR), None if magnitude_O is None else own(magnitude_O))


def lora_form(settings: LoraSettings, form: str, *, fp8: bool) -> LoraForm:
    """Returns how an adapter is to enter the products.

    Args:
        settings: of the adapter.
        form: one of `FORMS`; auto: folded without dropout, separate where products are in FP8.
        fp8: products are in FP8.

    Raises:
        ConfigError: a form that the settings or the products do not have.
    """
    if form not in FORMS:
        raise ConfigError(f"The adapter's form is {form!r}.", allowed=", ".join(FORMS))
    if fp8 and settings.dora:
        raise ConfigError(
            "Products in FP8 take no adapter with lora.dora.", allowed="lora.dora=false",
            next_step="--set lora.dora=false, or --set model.weights_policy=auto for products in 16 bits",
        )
    if settings.dora:
        if form == "separate":
            raise ConfigError("An adapter with DoRA's magnitudes has no separate form.", allowed="folded, auto")
        return LoraForm(settings.scale, 0.0, folded=True)
    if fp8 and settings.dropout:
        raise ConfigError(
            f"Products in FP8 take no adapter with dropout {settings.dropout}.", allowed="lora.dropout=0",
            next_step="--set lora.dropout=0, or --set model.weights_policy=auto for products in 16 bits",
        )
    if fp8 and form == "folded":
        raise ConfigError("FP8 weights cannot take an adapter in: their steps are larger.", allowed="separate")
    if form == "folded" and settings.dropout:
        raise ConfigError(
            f"An adapter with dropout {settings.dropout} cannot be folded into the weights.",
            allowed="separate with dropout", next_step="lora.dropout=0",
        )
    folded = form == "folded" or (form == "auto" and not settings.dropout and not fp8)
    return LoraForm(settings.scale, settings.dropout, folded)

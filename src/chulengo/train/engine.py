"""Which engine trains a run, and with which policies: decided once, before a weight is loaded, and said.

`auto` means the fast engine wherever it computes what was asked for, and the reference engine otherwise, with the
reason (`coverage.py`, and here what has to be asked of the device). `fast` where it does not apply is an error with
the same reason.

Policies change when something is computed and how much memory that takes, never a number; graphs, which fill batches
up, may change the last bits. `model/plan_policies.py` chooses them, by the same plan that says whether the run fits.
Products in FP8 are the exception: another arithmetic, never chosen, and where they cannot be had `auto` is no way out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chulengo.errors import DoesNotFitError
from chulengo.kernels import ops
from chulengo.model.llama_shape import read_llama_shape
from chulengo.model.load import resolve_device, resolve_dtype, use_threads
from chulengo.model.lora import lora_form
from chulengo.model.lora_settings import lora_settings
from chulengo.model.plan import DeviceMemory, TrainingMemory, device_memory, gib, training_memory
from chulengo.model.plan_policies import RunPlan, Wanted, check_room, leaner_run, plan_run
from chulengo.model.policy_checks import check_policies
from chulengo.train.coverage import DTYPE_OF, check_insisted, fast_dtype, why_not_covered
from chulengo.train.optimizer import resolve_precision

SETTINGS = ("weights_policy", "activations_policy", "embeddings_policy", "graphs")  # of section `model`
PRECISION_OF = {name: precision for precision, name in DTYPE_OF.items()}


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What trains a run.

    Attributes:
        engine: fast or reference.
        reason: why the fast engine does not apply; None when it does, or when the reference engine was asked for.
        compute_dtype: float32, bfloat16 or float16.
        precision: float32, bf16 or fp16.
        found: policies and plan of the fast engine; None for the reference engine.
        check_room: raises `DoesNotFitError` when the fast engine's plan does not fit; tells `say` of a tight one.
        leaner: returns the choice with policies that need less, None when there are none.
        unused: settings that were given and that only the fast engine has, where it does not train.
    """

    engine: str
    reason: str | None
    compute_dtype: str
    precision: str
    found: RunPlan | None = None
    check_room: Callable[..., None] = lambda **_: None
    leaner: Callable[[], EngineChoice | None] = lambda: None
    unused: tuple[str, ...] = ()

    def without_effect(self) -> str | None:
        """Returns a sentence that names the settings that do nothing here, or None."""
        return f"Without effect there: {', '.join(self.unused)}." if self.unused else None

    def settings(self) -> dict[str, str]:
        """Returns what every `auto` of section `model` stands for; activations that differ by layer stay `auto`."""
        resolved = {"compute_dtype": self.compute_dtype, "engine": self.engine}
        if self.found is None:
            return resolved | dict.fromkeys(SETTINGS, "auto")
        policies = self.found.policies
        kinds = set(policies.activations)
        activations = kinds.pop() if len(kinds) == 1 else "auto"
        graphs = "always" if policies.graphs else "never"
        values = (policies.weights, activations, policies.embeddings, graphs)
        return resolved | dict(zip(SETTINGS, values, strict=True))


def choose_engine(
    wanted: str, model_config: Mapping[str, Any], *, policies: Wanted, lora: Mapping[str, Any], longest_row: int,
    plan: Mapping[str, Any], device: str,
) -> EngineChoice:
    """Returns the engine and its policies, every `auto` resolved.

    Args:
        wanted: auto, fast or reference.
        model_config: content of the model's `config.json`.
        policies: of the fast engine, as the user wants them.
        lora: the arguments of `attach_lora`, but for the seed.
        longest_row: in tokens.
        plan: the settings that decide memory, as `model.plan.training_memory` takes them.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: `fast` or FP8 was asked for and does not apply; a policy, dtype or precision that the model or the
            device cannot have.
    """
    place = resolve_device(device)
    compute_dtype, precision = plan["compute_dtype"], plan["precision"]
    if wanted != "reference":
        memory = device_memory(str(place))
        reason = why_not_fast(
            model_config, lora=lora, longest_row=longest_row, plan=plan, place=place, memory=memory,
            weights_policy=policies.weights,
        )
        if reason is None:
            check_policies(policies, read_llama_shape(model_config, max_seq_tokens=longest_row).sizes, memory)
            if policies.weights.endswith("fp8"):
                lora_form(lora_settings(**lora), "auto", fp8=True)  # raises for an adapter that FP8 does not take
            name = fast_dtype(compute_dtype, precision, memory.kind, has_bf16=memory.has_bf16)
            assert name is not None, "why_not_fast has asked"
            exact = {**plan, "compute_dtype": name, "precision": PRECISION_OF[name]}
            settings = training_memory(device=memory, **exact)
            found = plan_run(model_config, settings, memory, policies)
            return _fast_choice(name, found, (model_config, settings, memory), policies)
        check_insisted(wanted, policies.weights, reason)
    else:
        reason = None
    dtype = str(resolve_dtype(compute_dtype, place)).removeprefix("torch.")
    return EngineChoice("reference", reason, dtype, resolve_precision(precision, place))


def _fast_choice(
    dtype: str, found: RunPlan, planned: tuple[Mapping[str, Any], TrainingMemory, DeviceMemory], wanted: Wanted
) -> EngineChoice:
    def leaner() -> EngineChoice | None:
        less = leaner_run(*planned, found, wanted)
        return None if less is None else _fast_choice(dtype, less, planned, wanted)

    room = functools.partial(check_room, *planned, found, wanted)
    return EngineChoice("fast", None, dtype, PRECISION_OF[dtype], found, room, leaner)


def why_not_fast(
    model_config: Mapping[str, Any], *, lora: Mapping[str, Any], longest_row: int, plan: Mapping[str, Any],
    place: torch.device, memory: DeviceMemory, weights_policy: str,
) -> str | None:
    """Returns a sentence that says what the fast engine does not cover here, or None when it covers everything.

    Raises:
        ConfigError: a dtype or precision that the device does not have.
    """
    resolve_dtype(plan["compute_dtype"], place)
    resolve_precision(plan["precision"], place)
    reason = why_not_covered(
        model_config, lora=lora, longest_row=longest_row, plan=plan, kind=memory.kind, has_bf16=memory.has_bf16,
        weights_policy=weights_policy,
    )
    if reason is None and place.type == "cuda" and ops.choose(place)[0] != "fused":
        return f"Its kernels do not run here: {ops.choose(place)[1]}."
    return reason


def load_model(
    choice: EngineChoice, folder: Path, *, lora: Mapping[str, Any], seed: int, quantization: str, double_quant: bool,
    device: str, attention: str, cpu_threads: int | None, longest_row: int, name: str, vocab_size: int,
) -> tuple[Any, dict[str, str]]:
    """Returns the engine's model with a fresh adapter, and what the manifest and the user are to know of it.

    Args:
        choice: of `choose_engine`.
        folder: of the base model.
        lora: the arguments of `attach_lora`, but for the seed.
        seed: of the adapter's beginning, and of dropout.
        quantization: of the frozen weights.
        double_quant: quantise the block scales too.
        device: auto, cpu, cuda or cuda:N.
        attention: of the reference engine.
        cpu_threads: of products on a CPU; None: PyTorch's choice.
        longest_row: in tokens.
        name: of the base, for the adapter's files.
        vocab_size: ids that the tokenizer can produce.

    Raises:
        DoesNotFitError: the device has not the memory.
    """
    use_threads(cpu_threads)
    shared: dict[str, Any] = {
        "quantization": quantization, "double_quant": double_quant, "compute_dtype": choice.compute_dtype,
        "device": device, "name": name, "vocab_size": vocab_size,
    }  # fmt: skip
    if choice.engine == "fast":
        from chulengo.model.fast import load_fast

        assert choice.found is not None, "the fast engine has a plan"
        how = choice.found.policies
        with _room_for(f"the weights of {name}", choice, device):
            model = load_fast(
                folder, **shared, max_seq_tokens=longest_row, weights=how.weights, activations=how.activations,
                embeddings=how.embeddings, graphs=how.graphs,
            )
        # float32 is a CPU's, where the forms differ in rounding only: a step of the demo took 0.148 s of one core with
        # W + s B A written once a step, 0.133 with two products more
        separate = choice.compute_dtype == "float32" and not lora["dora"]  # which is only folded
        with _room_for(f"{name} with its adapter", choice, device):
            model.attach_lora(**lora, seed=seed, form="separate" if separate else "auto")
        return model, {"name": "fast", **model.describe()}
    from chulengo.model.adapter import attach_lora, fully_trained
    from chulengo.model.load import load_base

    base = load_base(folder, **shared, attention=attention)
    with _room_for(f"{name} with its adapter", choice, device):
        adapted = attach_lora(base, **lora, seed=seed)
    facts = {"name": "reference", "weights": f"{quantization}, {choice.compute_dtype}", "attention": attention}
    more = {
        "reason": choice.reason, "without effect": choice.without_effect(), "trained in full": fully_trained(adapted),
    }  # fmt: skip
    return adapted, facts | {name: value for name, value in more.items() if value is not None}


@contextlib.contextmanager
def _room_for(what: str, choice: EngineChoice, device: str) -> Iterator[None]:
    """Makes an allocation that fails inside the block a `DoesNotFitError` that says what was planned."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        plan = None if choice.found is None else choice.found.plan
        planned = f", though {gib(plan.peak_bytes)} were planned for the whole run" if plan else ""
        raise DoesNotFitError(
            f"{resolve_device(device)} has no room for {what}{planned}.",
            next_step="a smaller model, or: chulengo plan, which says what needs how much",
        ) from error


def adapter_writer(model: Any) -> Callable[[Path], None]:
    """Returns the function that writes a model's adapter in PEFT's files."""
    from chulengo.model.adapter import save_adapter
    from chulengo.model.fast import FastModel

    return model.save_adapter if isinstance(model, FastModel) else functools.partial(save_adapter, model)


def describe_engine(facts: Mapping[str, str]) -> str:
    """Returns what tells the user which engine trains, how, what beside the adapter, and why it is not the fast one."""
    if facts["name"] == "fast":
        shown: tuple[str, ...] = ("weights", "activations", "adapter", "kernels")
        shown += ("embeddings",) if facts["embeddings"] == "host" else ()
        shown += ("graphs",) if facts["graphs"] != "none" else ()
        return "engine: fast · " + " · ".join(f"{name} {facts[name]}" for name in shown)
    why = f"; the fast one does not cover this run. {facts['reason']}" if "reason" in facts else ""
    why += f" {facts['without effect']}" if "without effect" in facts else ""
    full = f"\n{facts['trained in full']}" if "trained in full" in facts else ""
    return f"engine: reference (transformers, peft, bitsandbytes){why}{full}"

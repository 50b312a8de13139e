"""Will it fit, and if not, what is the smallest change: the door to the plan.

`predict_memory` (plan_memory.py) predicts; this file holds a prediction against a device. A run is refused only when
its tensors and the CUDA context exceed what is free: the allocator's slack, which PyTorch gives back under pressure,
makes a plan *tight*, not impossible.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chulengo.errors import DoesNotFitError
from chulengo.model.gpu_limit import limit_of
from chulengo.model.plan_memory import GRAPHS, SLACK, Plan, TrainingMemory, gib, predict_memory
from chulengo.model.plan_shapes import stored_shapes

if TYPE_CHECKING:
    import torch

__all__ = [
    "DeviceMemory", "Plan", "TrainingMemory", "advice", "changed_memory", "changes_by_cost", "check_fits",
    "device_memory", "does_not_fit", "first_fitting", "gib", "is_tight", "needed_bytes", "override_text",
    "predict_memory", "room_line", "smallest_change", "stored_shapes", "training_memory",
]  # fmt: skip

BATCH_KEYS = ("training.batch_size", "training.gradient_accumulation")
NOT_NEEDED = (SLACK, GRAPHS)  # beside the tensors, to start at all
LEAST_TOKENS, LEAST_RANK = 256, 4  # nobody is advised to go below


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device, as far as a plan needs it."""

    name: str
    kind: str  # cuda or cpu
    free_bytes: int
    total_bytes: int
    has_bf16: bool = True
    host_bytes: int | None = None  # this process's share of the free memory of a GPU's machine; None: enough
    capability: tuple[int, int] | None = None  # compute capability of a GPU; None: not known


def device_memory(device: str = "auto") -> DeviceMemory:
    """Returns name and memory of `auto`, `cpu`, `cuda` or `cuda:N`. Imports torch unless the device is `cpu`.

    Of a GPU that this process may not take whole (`gpu_limit.py`), what it may take.

    Raises:
        ConfigError: there is no such device.
    """
    import psutil

    memory = psutil.virtual_memory()
    share = memory.available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # set by torchrun
    if device != "cpu":
        import torch

        from chulengo.model.load import resolve_device

        place = resolve_device(device)
        if place.type == "cuda":
            free, total = torch.cuda.mem_get_info(place)
            capability = torch.cuda.get_device_capability(place)
            name, limit = torch.cuda.get_device_name(place), limit_of(place)
            if limit is not None:
                name, free, total = f"{name}, limited to {gib(limit)},", min(free, limit), limit
            return DeviceMemory(name, "cuda", free, total, capability[0] >= 8, share, capability)
    return DeviceMemory(f"this machine ({os.cpu_count()} CPU cores)", "cpu", memory.available, memory.total)


def training_memory(
    *, device: DeviceMemory, max_seq_tokens: int, compute_dtype: str = "auto", precision: str = "auto",
    batching: str = "padded", **values: Any,
) -> TrainingMemory:
    """Returns the settings that `predict_memory` takes, with every `auto` resolved for the device.

    Args:
        device: where the run goes.
        max_seq_tokens: the longest row, in tokens: what memory has to be there for.
        compute_dtype: auto, float32, bfloat16 or float16.
        precision: of autocast: auto, float32 (none), bf16 or fp16.
        batching: padded, group_by_length or packed.
        values: the other fields of `TrainingMemory`, by name.
    """
    sixteen_bit = "bfloat16" if device.has_bf16 else "float16"
    on_gpu = device.kind == "cuda"
    if compute_dtype == "auto":
        compute_dtype = sixteen_bit if on_gpu else "float32"
    fixed: dict[str, Any] = {
        "row_tokens": max_seq_tokens, "compute_dtype": compute_dtype, "packed": batching == "packed",
        "device": device.kind, "autocast": on_gpu if precision == "auto" else precision != "float32",
    }  # fmt: skip
    return TrainingMemory(**(values | fixed))


def check_fits(
    config: Mapping[str, Any],
    *,
    device: torch.device | str,
    stored: Mapping[str, Sequence[int]] | None = None,
    say: Callable[[str], None] | None = None,
    **values: Any,
) -> Plan:
    """Returns the plan of a run that fits on a device; to be called before anything is loaded.

    A plan that is only a lower bound is refused only when even that does not fit.

    Args:
        config: content of the model's `config.json`.
        device: cpu, cuda, cuda:N or auto, or what `model.load.resolve_device` made of it.
        stored: shapes of the stored tensors, for architectures that the plan does not know.
        say: told of a plan that is tight, in the plan's own words.
        values: see `training_memory`.

    Raises:
        DoesNotFitError: it does not; the message names the smallest change that does.
    """
    place = device_memory(str(device))
    settings = training_memory(device=place, **values)
    plan = predict_memory(config, settings, stored=stored)
    if needed_bytes(plan) > place.free_bytes:
        change = smallest_change(config, settings, place.free_bytes)
        raise DoesNotFitError(does_not_fit(plan, place), next_step=advice(change))
    if say is not None and is_tight(plan, place):
        say(room_line(plan, place))
    return plan


def is_tight(plan: Plan, device: DeviceMemory) -> bool:
    """Returns whether a plan fits only without the allocator's slack."""
    return needed_bytes(plan) <= device.free_bytes < plan.device_bytes


def room_line(plan: Plan, device: DeviceMemory, verdict: str = "fits") -> str:
    """Returns what is needed, what there is, and what follows, in one line.

    Args:
        plan: of the run.
        device: where it goes.
        verdict: as the reader is to see it.
    """
    least = "" if plan.predicted else "at least "
    need = f"needs {least}{gib(needed_bytes(plan))}, {device.name} has {gib(device.free_bytes)} free"
    slack = " (tight: the allocator will have to give back its slack)" if is_tight(plan, device) else ""
    return f"{need}: {verdict}, {needed_bytes(plan) / max(1, device.free_bytes):.0%}{slack}"


def needed_bytes(plan: Plan) -> int:
    """Returns what must be free for the run to start at all: everything but the allocator's slack, and graphs."""
    return plan.device_bytes - sum(plan.beside.get(name, 0) for name in NOT_NEEDED)


def smallest_change(
    config: Mapping[str, Any], settings: TrainingMemory, device_bytes: int
) -> tuple[tuple[str, ...], Plan] | None:
    """Returns the first of an ordered list of changes with which the run fits, and its plan; None when none does.

    The order is by what a change costs: recomputation costs time only; a smaller batch with accumulation changes
    nothing that is learned; a paged 8-bit optimiser hardly; quantised weights, shorter rows and, last, a lower rank do.
    Each later change keeps the earlier ones where they are needed.

    Returns:
        `--set` strings such as "training.gradient_checkpointing=true", and the plan with them.
    """

    def fitting(changes: Mapping[str, Any]) -> Plan | None:
        plan = predict_memory(config, changed_memory(settings, changes))
        return plan if plan.predicted and needed_bytes(plan) <= device_bytes else None

    return first_fitting(changes_by_cost(settings), fitting)


def first_fitting(
    candidates: Sequence[Mapping[str, Any]], fitting: Callable[[Mapping[str, Any]], Plan | None]
) -> tuple[tuple[str, ...], Plan] | None:
    """Returns the first of some changes that fits, less what it does not need, as `--set` strings, and its plan.

    Args:
        candidates: changes as `changes_by_cost` returns them.
        fitting: returns the plan of a run with changes if it fits, else None.
    """
    for changes in candidates:
        plan = fitting(changes)
        if plan is None:
            continue
        kept: dict[str, Any] = dict(changes)
        for keys in reversed(_together(changes)):
            fewer = {key: value for key, value in kept.items() if key not in keys}
            without = fitting(fewer) if fewer else None
            if without is not None:
                kept, plan = fewer, without
        # and of batches the largest: the candidates name them from there down
        larger = (each for each in candidates if set(each) == set(BATCH_KEYS) <= set(kept))
        for more in ({**kept, **each} for each in larger):
            if (with_more := fitting(more)) is not None:
                kept, plan = more, with_more
                break
        return tuple(override_text(key, value) for key, value in kept.items()), plan
    return None


def _together(changes: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the keys in groups that are changed or left together: rows an update are batch times accumulation."""
    batch = tuple(key for key in changes if key in BATCH_KEYS)
    return ([batch] if batch else []) + [(key,) for key in changes if key not in batch]


def does_not_fit(plan: Plan, device: DeviceMemory) -> str:
    """Returns the sentence that says what is needed and what there is."""
    needed = {name: size for name, size in plan.parts.items() if name not in NOT_NEEDED}
    largest = sorted(needed.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {gib(size)}" for name, size in largest if size)
    least = "" if plan.predicted else "at least "
    return (
        f"This run does not fit: it needs {least}{gib(needed_bytes(plan))}, "
        f"and {device.name} has {gib(device.free_bytes)} free. Largest parts: {parts}."
    )


def advice(change: tuple[tuple[str, ...], Plan] | None) -> str:
    """Returns what to type so that it fits."""
    if change is None:
        return (
            "a smaller model or a larger device: no change of batch, recomputation, optimiser, row length or rank "
            "suffices"
        )
    overrides, plan = change
    return " ".join(f"--set {override}" for override in overrides) + f"   (then {gib(needed_bytes(plan))})"


def changes_by_cost(settings: TrainingMemory) -> list[dict[str, Any]]:
    """Returns the candidate changes, cheapest first, as {"section.key": value}."""
    recompute: dict[str, Any] = (
        {} if settings.gradient_checkpointing else {"training.gradient_checkpointing": True}
    )
    smaller: list[dict[str, Any]] = [  # the same rows in each update, in as few micro-batches as it takes
        dict(zip(BATCH_KEYS, (rows, settings.gradient_accumulation * settings.batch_size // rows), strict=True))
        for rows in range(settings.batch_size - 1, 0, -1) if settings.batch_size % rows == 0
    ]  # fmt: skip
    paged: dict[str, Any] = {} if "8bit" in settings.optimizer else {"training.optimizer": "paged_adamw_8bit"}
    nf4: dict[str, Any] = {} if settings.quantization == "nf4" else {"model.quantization": "nf4"}
    base = recompute | (smaller[-1] if smaller else {}) | paged
    steps = [recompute, *smaller, *(recompute | small for small in smaller), base]
    if nf4:
        steps += [nf4, nf4 | recompute, nf4 | base]
    shorter = [{"training.max_seq_tokens": tokens} for tokens in _halves(settings.row_tokens, LEAST_TOKENS)]
    lower = [{"lora.rank": rank} for rank in _halves(settings.rank, LEAST_RANK)]
    steps += [nf4 | base | less for less in shorter + lower]
    steps += [nf4 | base | less | shorter[-1] for less in lower if shorter]
    unique: list[dict[str, Any]] = []
    for step in steps:
        if step and step not in unique:
            unique.append(step)
    return unique


def _halves(number: int, least: int) -> list[int]:
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def changed_memory(settings: TrainingMemory, changes: Mapping[str, Any]) -> TrainingMemory:
    """Returns the settings with changes of `changes_by_cost`."""
    renamed = {"max_seq_tokens": "row_tokens"}
    names = {key.rpartition(".")[2]: value for key, value in changes.items()}
    values = {name: getattr(settings, name) for name in settings.__slots__}
    return TrainingMemory(**(values | {renamed.get(name, name): value for name, value in names.items()}))


def override_text(key: str, value: Any) -> str:
    """Returns what follows `--set` to make a change."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"

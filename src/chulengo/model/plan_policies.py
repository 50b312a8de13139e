"""Which policies the fast engine takes on a device: the fastest that fit, or what the user insists on.

The policies form one list, fastest first, and the first that fits is taken. Between "selective" and what is computed
again it goes layer by layer, so that memory is filled and not more. Layers that are computed again move as much to the
host as an H200's bus carries beside their work: attention's output and both streams ("offload-attention"), or only
their input ("offload") in FP8, where there is less to hide behind, and where the host has no room for more. A slower
bus is not asked for: who has one sets "offload". Full means full: whatever is chosen leaves the allocator its slack,
and only when not even the leanest policies do is a run started without it.

A CPU has no card to fill and no plan that was measured: there the reference engine's plan decides, which needs more
for the same rows. Activations are kept where that fits, and the matrices where they fit beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from chulengo.errors import DoesNotFitError
from chulengo.model.plan import (
    DeviceMemory,
    advice,
    changed_memory,
    changes_by_cost,
    does_not_fit,
    needed_bytes,
    override_text,
    predict_memory,
)
from chulengo.model.plan_fast import RECOMPUTED, Policies, pinned_bytes, predict_fast
from chulengo.model.plan_memory import DTYPE_BYTES, Plan, TrainingMemory
from chulengo.model.plan_shapes import ModelShape, read_shape

GRAPH_TOKENS = 2048  # up to here a step is bound by launches, and a graph pays (H200: 512 tokens 390 -> 65 ms)
LEANER = 0.9  # of what ran out of memory; the plan's memory is within 1 % of what is used
PINNED_SHARE = 0.5  # of the host's free memory that may be pinned for what layers could compute again
SETTING = {  # what the user types to insist on a policy
    "weights": "model.weights_policy", "activations": "model.activations_policy",
    "embeddings": "model.embeddings_policy", "graphs": "model.graphs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user insists on; `auto` leaves it to the plan.

    Attributes:
        weights: auto, stream, resident, or fp8, stream-fp8, resident-fp8, which are never chosen by themselves.
        activations: auto, keep, selective, full, offload or offload-attention, of all layers.
        embeddings: auto, device or host.
        graphs: auto, always or never.
    """

    weights: str = "auto"
    activations: str = "auto"
    embeddings: str = "auto"
    graphs: str = "auto"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How the fast engine runs here, and what that needs: the leanest policies where nothing fits."""

    policies: Policies
    plan: Plan


def plan_run(
    config: Mapping[str, Any], settings: TrainingMemory, device: DeviceMemory, wanted: Wanted | None = None
) -> RunPlan:
    """Returns the policies of a run, and its plan, which fits if anything does.

    Args:
        config: content of the model's `config.json`; an architecture that `read_shape` knows.
        settings: of the run.
        device: where it goes.
        wanted: what the user insists on.
    """
    wanted = wanted or Wanted()
    shape = read_shape(config)
    assert shape is not None, "the fast engine covers nothing else"
    if device.kind != "cuda":
        return _on_cpu(config, shape, settings, device.free_bytes, wanted)
    policies = choose_policies(shape, settings, device.free_bytes, wanted, host_bytes=device.host_bytes)
    if policies is not None:
        return RunPlan(policies, predict_fast(shape, settings, policies))
    rows = _candidates(shape, settings, wanted, device.host_bytes)
    plans = [RunPlan(each, predict_fast(shape, settings, each)) for each in rows]
    return min(plans, key=lambda found: needed_bytes(found.plan))


def choose_policies(
    shape: ModelShape, settings: TrainingMemory, free_bytes: int, wanted: Wanted | None = None, *,
    host_bytes: int | None = None,
) -> Policies | None:  # fmt: skip
    """Returns the fastest policies that fit on a GPU, or None when none does.

    Args:
        shape: of the model.
        settings: of the run; `gradient_checkpointing` rules out keeping activations.
        free_bytes: of the device.
        wanted: what the user insists on.
        host_bytes: free memory of the host; None: enough.
    """
    tight: tuple[int, Policies] | None = None
    for policies in _candidates(shape, settings, wanted or Wanted(), host_bytes):
        plan = predict_fast(shape, settings, policies)
        if plan.device_bytes <= free_bytes:
            return policies
        needed = needed_bytes(plan)
        if needed <= free_bytes and (tight is None or needed < tight[0]):
            tight = needed, policies
    return None if tight is None else tight[1]


def leaner_run(
    config: Mapping[str, Any], settings: TrainingMemory, device: DeviceMemory, found: RunPlan,
    wanted: Wanted | None = None,
) -> RunPlan | None:  # fmt: skip
    """Returns the fastest policies that need a tenth less than those that ran out of memory, and their plan, or None.

    Args:
        config: content of the model's `config.json`.
        settings: of the run.
        device: where it goes.
        found: what ran out of memory.
        wanted: what the user insists on.
    """
    wanted = wanted or Wanted()
    shape = read_shape(config)
    assert shape is not None, "the fast engine covers nothing else"
    if device.kind != "cuda":
        if wanted.activations != "auto" or found.policies.activations[0] != "keep":
            return None
        return _on_cpu(config, shape, settings, device.free_bytes, replace(wanted, activations="full"))
    for policies in _candidates(shape, settings, wanted, device.host_bytes):
        plan = predict_fast(shape, settings, policies)
        if needed_bytes(plan) <= LEANER * needed_bytes(found.plan):
            return RunPlan(policies, plan)
    return None


def check_room(
    config: Mapping[str, Any], settings: TrainingMemory, device: DeviceMemory, found: RunPlan,
    wanted: Wanted | None = None,
) -> None:  # fmt: skip
    """Raises `DoesNotFitError`, with the smallest change that does, unless a plan of `plan_run` fits."""
    if needed_bytes(found.plan) > device.free_bytes:
        change = smallest_run_change(config, settings, device, wanted)
        raise DoesNotFitError(does_not_fit(found.plan, device), next_step=advice(change))


def smallest_run_change(
    config: Mapping[str, Any], settings: TrainingMemory, device: DeviceMemory, wanted: Wanted | None = None
) -> tuple[tuple[str, ...], Plan] | None:
    """Returns the first of an ordered list of changes with which the fast engine's run fits, and its plan, or None.

    What the plan can choose by itself is no change; leaving to it what the user insisted on is the smallest.
    """
    wanted = wanted or Wanted()
    # recomputation is not among the changes: `auto` does it by itself where that is needed
    for changes in ({}, *changes_by_cost(replace(settings, gradient_checkpointing=True))):
        for freed in _freed(wanted):
            overrides = {SETTING[name]: value for name, value in freed.items()} | changes
            if not overrides:
                continue
            left = replace(wanted, **freed)
            found = plan_run(config, changed_memory(settings, changes), device, left)
            if needed_bytes(found.plan) <= device.free_bytes:
                return tuple(override_text(key, value) for key, value in overrides.items()), found.plan
    return None


def _freed(wanted: Wanted) -> list[dict[str, str]]:
    """Returns which of the policies insisted on are left to the plan: none, one of them, all. FP8 stays FP8."""
    left = {name: "fp8" if value.endswith("fp8") else "auto" for name, value in asdict(wanted).items()}
    given = {name: value for name, value in left.items() if value != getattr(wanted, name)}
    singles = [{name: value} for name, value in given.items()]
    return [{}, *singles, *([given] if len(given) > 1 else [])]


def _candidates(
    shape: ModelShape, settings: TrainingMemory, wanted: Wanted, host_bytes: int | None
) -> Iterator[Policies]:
    """Yields the policies of a run on a GPU, fastest first."""
    layers, tokens = shape.num_layers, settings.batch_size * settings.row_tokens
    graphs = wanted.graphs == "always" or (wanted.graphs == "auto" and tokens <= GRAPH_TOKENS)
    last = "device" if shape.tied else "host"
    if wanted.activations != "auto":
        whole = (wanted.activations,) * layers
        rows = [("resident", whole, "device"), ("stream", whole, "device"), ("stream", whole, last)]
        rows.append(("resident", whole, last))
    else:
        kinds = ("offload",) if wanted.weights.endswith("fp8") else ("offload-attention", "offload")
        leans = [(kind,) * layers for kind in kinds]
        if settings.gradient_checkpointing:
            rows = [(weights, ("full",) * layers, "device") for weights in ("resident", "stream")]
        else:
            both = [("keep",) * layers, ("selective",) * layers]
            rows = [(weights, kept, "device") for weights in ("resident", "stream") for kept in both]
            numbers = range(layers - 1, 0, -1)
            rows += [("stream", ("selective",) * n + lean[n:], "device") for lean in leans for n in numbers]
        rows += [("stream", lean, where) for lean in leans for where in ("device", last)]
        if wanted.weights.startswith("resident"):
            rows += [("resident", kept, where) for weights, kept, where in rows if weights == "stream"]
    seen = set()
    eighth = "-fp8" if wanted.weights.endswith("fp8") else ""
    for name, activations, embeddings in rows:
        weights = name + eighth
        if wanted.weights not in ("auto", "fp8", weights):
            continue
        where = embeddings if wanted.embeddings == "auto" else wanted.embeddings
        policies = Policies(weights, activations, where, graphs)
        crowded = (
            wanted.activations == "auto" and "offload-attention" in activations and host_bytes is not None
            and pinned_bytes(shape, settings, policies) > PINNED_SHARE * host_bytes
        )  # fmt: skip
        if policies not in seen and not crowded:
            seen.add(policies)
            yield policies


def _on_cpu(
    config: Mapping[str, Any], shape: ModelShape, settings: TrainingMemory, free_bytes: int, wanted: Wanted
) -> RunPlan:
    def planned(activations: str) -> Plan:
        again = settings.gradient_checkpointing or activations in RECOMPUTED
        return predict_memory(config, replace(settings, gradient_checkpointing=again))

    activations = wanted.activations
    if activations == "auto":
        keeps = not settings.gradient_checkpointing and needed_bytes(planned("keep")) <= free_bytes
        activations = "keep" if keeps else "full"
    plan, weights = planned(activations), wanted.weights
    if weights in ("auto", "fp8"):
        # two copies of one byte, or one in the compute dtype
        size = 2 if weights == "fp8" else DTYPE_BYTES[settings.compute_dtype]
        fits = shape.num_layers * shape.layer_linear_weights * size <= free_bytes - needed_bytes(plan)
        weights = ("resident" if fits else "stream") + ("-fp8" if weights == "fp8" else "")
    embeddings = "device" if wanted.embeddings == "auto" else wanted.embeddings
    policies = Policies(weights, (activations,) * shape.num_layers, embeddings, wanted.graphs == "always")
    return RunPlan(policies, plan)

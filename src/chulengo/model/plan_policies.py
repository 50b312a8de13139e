"""Which policies the fast engine takes on a device: the fastest that fit, or what the user insists on.

Of all policies that fit, those are taken whose step is predicted to take the least time (`plan_speed.py`, at the rates
of one H200, so that `plan` and `train` choose alike wherever they run): memory is there for the longest rows, time is
that of mean ones, where the data are known and not packed. Between "selective" and what is computed again
it goes layer by layer, with streamed and with resident weights, so that memory is filled and not more. Layers that are
computed again move attention's output and both streams to the host ("offload-attention"), or only their input
("offload") in FP8, where there is less to hide behind, and where the host has no room for more. A slower bus than an
H200's is not asked for: who has one sets "offload" or "full". A graph is taken where launching a step would take the
host longer than the device, though its batches are filled up. Full means full: whatever is chosen leaves the allocator
its slack, and only when not even the leanest policies do, or when a graph makes them more than twice as fast, is a run
started without it.

A CPU has no card to fill and no plan that was measured: there the reference engine's plan decides, which needs more
for the same rows, with the resident matrices on top. Activations are kept where that fits, and the matrices where they
fit beside it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from itertools import product
from typing import Any

from chulengo.errors import DoesNotFitError
from chulengo.model.plan import (
    DeviceMemory,
    advice,
    changed_memory,
    changes_by_cost,
    does_not_fit,
    first_fitting,
    is_tight,
    needed_bytes,
    predict_memory,
    room_line,
)
from chulengo.model.plan_fast import RECOMPUTED, Policies, pinned_bytes, predict_fast
from chulengo.model.plan_memory import DTYPE_BYTES, Plan, TrainingMemory
from chulengo.model.plan_shapes import ModelShape, read_shape
from chulengo.model.plan_speed import H200, predict_step

LEANER = 0.9  # of what ran out of memory; the plan's memory is within 1 % of what is used
# where policies that need hardly more than the least are so many times as fast as those that leave the allocator its
# slack, they run without it: a graph, which is four times as fast for 150 MiB of 5 GiB
NEARLY_LEANEST, WORTH_THE_SLACK = 1.05, 2.0
PINNED_SHARE = 0.5  # of the host's free memory that may be pinned for what layers could compute again
SETTING = {  # what the user types to insist on a policy
    "weights": "model.weights_policy", "activations": "model.activations_policy",
    "embeddings": "model.embeddings_policy", "graphs": "model.graphs",
}  # fmt: skip

# policies of which each needs less memory than the one before, and takes more time
Family = tuple[Policies, ...]


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
    if policies is None:
        policies = _leanest(shape, settings, _families(shape, settings, wanted, device.host_bytes))
    return RunPlan(policies, predict_fast(shape, settings, policies))


def choose_policies(
    shape: ModelShape, settings: TrainingMemory, free_bytes: int, wanted: Wanted | None = None, *,
    host_bytes: int | None = None,
) -> Policies | None:  # fmt: skip
    """Returns the policies with the least predicted time among those that fit on a GPU, or None when none does.

    Args:
        shape: of the model.
        settings: of the run; `gradient_checkpointing` rules out keeping activations.
        free_bytes: of the device.
        wanted: what the user insists on.
        host_bytes: free memory of the host; None: enough.
    """
    families = _families(shape, settings, wanted or Wanted(), host_bytes)
    found = _fastest(shape, settings, families, lambda plan: plan.device_bytes <= free_bytes)
    leanest = _leanest(shape, settings, families)
    least = needed_bytes(predict_fast(shape, settings, leanest))
    if least > free_bytes:
        return None
    found = found or leanest
    most = min(free_bytes, NEARLY_LEANEST * least)
    ends = [family[-1:] for family in families]
    quick = _fastest(shape, settings, ends, lambda plan: needed_bytes(plan) <= most) or leanest
    seconds, less = (_seconds(shape, settings, each) for each in (found, quick))
    return quick if seconds > WORTH_THE_SLACK * less else found


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
    most = LEANER * needed_bytes(found.plan)
    families = _families(shape, settings, wanted, device.host_bytes)
    policies = _fastest(shape, settings, families, lambda plan: needed_bytes(plan) <= most)
    return None if policies is None else RunPlan(policies, predict_fast(shape, settings, policies))


def check_room(
    config: Mapping[str, Any], settings: TrainingMemory, device: DeviceMemory, found: RunPlan,
    wanted: Wanted | None = None, *, say: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Raises `DoesNotFitError`, with the smallest change that does, unless a plan of `plan_run` fits.

    Args:
        config: content of the model's `config.json`.
        settings: of the run.
        device: where it goes.
        found: of `plan_run`.
        wanted: what the user insists on.
        say: told of a plan that is tight, in the plan's own words.
    """
    if needed_bytes(found.plan) > device.free_bytes:
        change = smallest_run_change(config, settings, device, wanted)
        raise DoesNotFitError(does_not_fit(found.plan, device), next_step=advice(change))
    if say is not None and is_tight(found.plan, device):
        say(room_line(found.plan, device))


def smallest_run_change(
    config: Mapping[str, Any], settings: TrainingMemory, device: DeviceMemory, wanted: Wanted | None = None
) -> tuple[tuple[str, ...], Plan] | None:
    """Returns the first of an ordered list of changes with which the fast engine's run fits, and its plan, or None.

    What the plan can choose by itself is no change; leaving to it what the user insisted on is the smallest.
    """
    wanted = wanted or Wanted()
    wish = dict(zip(SETTING.values(), astuple(wanted), strict=True))

    def fitting(overrides: Mapping[str, Any]) -> Plan | None:
        left = Wanted(*(overrides.get(key, value) for key, value in wish.items()))
        changes = {key: value for key, value in overrides.items() if key not in wish}
        plan = plan_run(config, changed_memory(settings, changes), device, left).plan
        return plan if needed_bytes(plan) <= device.free_bytes else None

    # recomputation is not among the changes: `auto` does it by itself where that is needed
    changes: list[dict[str, Any]] = [{}, *changes_by_cost(replace(settings, gradient_checkpointing=True))]
    freed = [{SETTING[name]: value for name, value in some.items()} for some in _freed(wanted)]
    return first_fitting([some | more for more, some in product(changes, freed) if some or more], fitting)


def _freed(wanted: Wanted) -> list[dict[str, str]]:
    """Returns which of the policies insisted on are left to the plan: none, one of them, all. FP8 stays FP8."""
    left = {name: "fp8" if value.endswith("fp8") else "auto" for name, value in asdict(wanted).items()}
    given = {name: value for name, value in left.items() if value != getattr(wanted, name)}
    singles = [{name: value} for name, value in given.items()]
    return [{}, *singles, *([given] if len(given) > 1 else [])]


def _fastest(
    shape: ModelShape, settings: TrainingMemory, families: list[Family], fits: Callable[[Plan], bool]
) -> Policies | None:
    """Returns the policies with the least predicted time among those that fit; of equals the first."""
    best: tuple[float, Policies] | None = None
    for family in families:
        at = bisect_left(family, True, key=lambda each: fits(predict_fast(shape, settings, each)))
        if at == len(family):
            continue
        seconds = _seconds(shape, settings, family[at])
        if best is None or seconds < best[0]:
            best = seconds, family[at]
    return None if best is None else best[1]


def _seconds(shape: ModelShape, settings: TrainingMemory, policies: Policies) -> float:
    """Returns the predicted time of a micro-batch of mean rows."""
    rows = settings.row_tokens if settings.mean_tokens is None else min(settings.mean_tokens, settings.row_tokens)
    return predict_step(shape, replace(settings, row_tokens=rows), policies, H200).seconds


def _leanest(shape: ModelShape, settings: TrainingMemory, families: list[Family]) -> Policies:
    """Returns the policies that need the least memory; of equals the fastest."""

    def cost(policies: Policies) -> tuple[int, float]:
        needed = needed_bytes(predict_fast(shape, settings, policies))
        return needed, _seconds(shape, settings, policies)

    return min((family[-1] for family in families), key=cost)


def _families(shape: ModelShape, settings: TrainingMemory, wanted: Wanted, host_bytes: int | None) -> list[Family]:
    """Returns all policies that a run on a GPU may have, those first that are taken where the predicted time is equal.

    They come in families: one policy of activations for all layers, or layer by layer less of "selective", down to
    none. So the first member that fits is the fastest of its family, and is found by halving.
    """
    graphs = (False, True) if wanted.graphs == "auto" else (wanted.graphs == "always",)
    eighth = "-fp8" if wanted.weights.endswith("fp8") else ""
    weights = tuple(name for name in (f"resident{eighth}", f"stream{eighth}")
                    if wanted.weights in ("auto", "fp8", name))  # fmt: skip
    families: dict[Family, None] = {}
    for layers, embeddings in _activations(shape, settings, wanted):
        where = embeddings if wanted.embeddings == "auto" else wanted.embeddings
        for name, graph in product(weights, graphs):
            family = tuple(Policies(name, each, where, graph) for each in layers)
            if wanted.activations == "auto":
                family = tuple(each for each in family if not _crowded(shape, settings, each, host_bytes))
            if family:
                families[family] = None
    return list(families)


def _activations(
    shape: ModelShape, settings: TrainingMemory, wanted: Wanted
) -> Iterator[tuple[list[tuple[str, ...]], str]]:
    """Yields families of activations, and where the embeddings are."""
    layers, last = shape.num_layers, "device" if shape.tied else "host"
    if wanted.activations != "auto":
        for where in ("device", last):
            yield [(wanted.activations,) * layers], where
        return
    kinds = ("offload",) if wanted.weights.endswith("fp8") else ("offload-attention", "offload")
    for kept in ("full",) if settings.gradient_checkpointing else ("keep", "selective"):
        yield [(kept,) * layers], "device"
    for kind in kinds:
        most = 0 if settings.gradient_checkpointing else layers - 1
        yield [("selective",) * n + (kind,) * (layers - n) for n in range(most, -1, -1)], "device"
        yield [(kind,) * layers], last


def _crowded(shape: ModelShape, settings: TrainingMemory, policies: Policies, host_bytes: int | None) -> bool:
    """Returns whether the host has no room for what layers need not move there."""
    if host_bytes is None or "offload-attention" not in policies.activations:
        return False
    return pinned_bytes(shape, settings, policies) > PINNED_SHARE * host_bytes


def _on_cpu(
    config: Mapping[str, Any], shape: ModelShape, settings: TrainingMemory, free_bytes: int, wanted: Wanted
) -> RunPlan:
    """Returns the first that fits of: keep all, keep activations, keep matrices, keep neither; else the last."""
    usual = ("full",) if settings.gradient_checkpointing else ("keep", "full")
    kinds = usual if wanted.activations == "auto" else (wanted.activations,)
    eighth = "-fp8" if wanted.weights == "fp8" else ""
    free = wanted.weights in ("auto", "fp8")
    weights = (f"resident{eighth}", f"stream{eighth}") if free else (wanted.weights,)
    embeddings = "device" if wanted.embeddings == "auto" else wanted.embeddings
    for kind, name in product(kinds, weights):
        again = settings.gradient_checkpointing or kind in RECOMPUTED
        plan = predict_memory(config, replace(settings, gradient_checkpointing=again))
        if name.startswith("resident"):
            # two copies of one byte, or one in the compute dtype
            size = 2 if name.endswith("fp8") else DTYPE_BYTES[settings.compute_dtype]
            plan = _with_part(plan, "matrices", shape.num_layers * shape.layer_linear_weights * size)
        policies = Policies(name, (kind,) * shape.num_layers, embeddings, wanted.graphs == "always")
        if needed_bytes(plan) <= free_bytes:
            break
    return RunPlan(policies, plan)


def _with_part(plan: Plan, name: str, size: int) -> Plan:
    return replace(plan, moments={moment: {**parts, name: size} for moment, parts in plan.moments.items()})

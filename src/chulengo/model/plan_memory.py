"""Predicted peak memory of a training run, by part, from the model's `config.json` alone; nothing is loaded.

A step has three moments that can be its peak, and which one wins depends on the settings, so all are computed:

- *loss*: everything the layers saved, and the head's logits with their gradients (fp32, tokens x vocabulary);
- *layers*: the backward pass of one layer, with recomputation the only one whose inner tensors exist;
- *update*: gradients, optimiser states and the optimiser's temporaries, when activations are gone.

`peak_bytes` is what `torch.cuda.max_memory_allocated` shows. `device_bytes` adds what a device must have beside it: the
CUDA context and the allocator's slack. The alternative, running one step and looking, needs the memory that one wants
to know about, and the download.

Checked against 37 measured runs on one H200 (tests/unit/model/test_plan.py holds the figures). Llama 2 7B, NF4, rank
16, 4 x 2,048 tokens: 48.65 GiB measured, with recompute 9.11. Limits: a head or embeddings that are trained in full are
counted by arithmetic, not measured; rows are taken as full (`row_tokens` each) and every position as supervised; Flash
Attention's workspaces, evaluation batches larger than training's, and several GPUs are not modelled. On a CPU the
figure is rough: the allocator's fragmentation, the page cache of the weight files and the data itself come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chulengo.errors import ConfigError
from chulengo.model.plan_activations import (
    ActivationSettings,
    kept_despite_recompute,
    layer_backward_bytes,
    layer_cast_bytes,
    layer_token_bytes,
)
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape, linear_targets, read_shape

GIB = 1 << 30
FP32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# nvidia-smi minus torch's own reservation, at the end of a run: 965 MiB (H200, driver 580, torch 2.11+cu130; 619 MiB
# before the first kernel is loaded)
CUDA_CONTEXT_BYTES = 965 << 20
# cuBLAS workspace of one stream on Hopper, 8.1 MB: measured as what is left of a loaded model without its weights
WORKSPACE_BYTES = 8_519_680
# reserved over allocated: 82.77 / 78.95 GiB. Higher at small sizes (14.99 / 11.66), where the allocator keeps blocks
# that it gives back under pressure
ALLOCATOR_SLACK = 0.04
# resident size beside the predicted tensors in a CPU run of a tiny model: 607 MiB (torch 2.13 CPU; 474 of them imports)
CPU_PROCESS_BYTES = 610 << 20

BLOCK_4BIT, BLOCK_SCALES = 64, 256  # bitsandbytes: weights a scale, scales a second-level scale
MIN_8BIT_ELEMENTS = 4096  # bitsandbytes keeps smaller tensors' optimiser states in fp32
MIN_PAGED_ELEMENTS = 100_000  # and smaller ones' on the device

WEIGHTS, OTHER, ADAPTER, OPTIMIZER, GRADIENTS = (
    "quantised weights", "other weights", "adapter", "optimiser states", "gradients",
)  # fmt: skip
SAVED, LAYER, HEAD, CACHE, CASTS, WORKSPACE = (
    "saved by the layers", "one layer's backward pass", "logits and loss", "key-value cache", "casts of the adapter",
    "workspace",
)  # fmt: skip
CONTEXT, SLACK, PROCESS = "CUDA context", "allocator slack", "Python and libraries"
GRAPHS = "CUDA graphs"  # beside PyTorch's memory; a run goes on without the ones that find no room


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """The settings of a run that decide its memory, as plain values.

    `upcast` and `use_cache` describe how others run the same engine (PEFT's `prepare_model_for_kbit_training`;
    transformers' default, which fills a key-value cache in training when it does not recompute). Chulengo does neither.
    """

    batch_size: int
    row_tokens: int
    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    dora: bool = False
    train_head: bool = False
    train_embeddings: bool = False
    quantization: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    autocast: bool = True
    attention: str = "sdpa"
    packed: bool = False
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    device: str = "cuda"
    upcast: bool = False
    use_cache: bool = False
    padded: bool | None = None  # whether rows differ in length; None: when there is more than one
    mean_tokens: int | None = None  # of a row, by which policies are chosen; None: rows are full


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted bytes of a run."""

    moments: Mapping[str, Mapping[str, int]]  # moment -> part -> bytes
    moment: str  # the one with the peak
    beside: Mapping[str, int]  # what the device must have beside the tensors
    num_parameters: int
    num_trainable: int
    device: str
    host_bytes: int = 0  # of the host: paged optimiser states, when the device is full; states of layers, pinned
    reason: str | None = None  # why nothing could be predicted but a lower bound; None: predicted
    notes: tuple[str, ...] = field(default=())

    @property
    def predicted(self) -> bool:
        """Whether this is a prediction, as opposed to a lower bound from the weights alone."""
        return self.reason is None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak, tensors first, then what is beside them."""
        return {**self.moments[self.moment], **self.beside}

    @property
    def peak_bytes(self) -> int:
        """Peak of the tensors: what `torch.cuda.max_memory_allocated` will show."""
        return sum(self.moments[self.moment].values())

    @property
    def device_bytes(self) -> int:
        """What the device must have free."""
        return self.peak_bytes + sum(self.beside.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-able dict; all sizes in bytes."""
        entries = {key: value for key, value in asdict(self).items() if key != "notes"}
        totals = {"peak_bytes": self.peak_bytes, "device_bytes": self.device_bytes, "predicted": self.predicted}
        return {**totals, **entries, "parts": self.parts, "notes": list(self.notes)}


def predict_memory(
    config: Mapping[str, Any], settings: TrainingMemory, *, stored: Mapping[str, Sequence[int]] | None = None
) -> Plan:
    """Returns the predicted memory of training a model with these settings.

    Args:
        config: content of the model's `config.json`.
        settings: the run, in plain values.
        stored: shape of every stored tensor by name (from the safetensors headers); used for a lower bound when the
            architecture is unknown.

    Raises:
        ConfigError: a dtype, quantisation or optimiser that does not exist.
    """
    _check(settings)
    shape = read_shape(config)
    targets = linear_targets(settings.targets)
    if shape is None:
        kind = config.get("model_type")
        return _lower_bound(settings, stored or {}, f"the architecture {kind!r} is not one whose layers are known")
    if targets is None:
        return _lower_bound(settings, stored or {}, f"LoRA on {', '.join(settings.targets)} is not modelled")
    return _predict(shape, settings, targets)


def gib(num_bytes: int) -> str:
    """Returns bytes in GiB with two digits, in MiB below one GiB and in KiB below one MiB."""
    if num_bytes < 1 << 20:
        return f"{num_bytes / (1 << 10):.0f} KiB"
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.0f} MiB"


def _check(settings: TrainingMemory) -> None:
    wrong = [
        f"{name} {value!r} (allowed: {', '.join(allowed)})"
        for name, value, allowed in (
            ("compute_dtype", settings.compute_dtype, tuple(DTYPE_BYTES)),
            ("quantization", settings.quantization, ("nf4", "fp4", "int8", "none")),
            ("optimizer", settings.optimizer, ("adamw", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit")),
        )
        if value not in allowed
    ]
    if wrong:
        raise ConfigError(f"Nothing can be planned for {'; '.join(wrong)}.")


def _predict(shape: ModelShape, settings: TrainingMemory, targets: tuple[str, ...]) -> Plan:
    compute = DTYPE_BYTES[settings.compute_dtype]
    other = FP32 if settings.upcast else compute
    tokens = settings.batch_size * settings.row_tokens
    trainable = _trainable_sizes(shape, settings, targets)
    optimizer, host = _optimizer_bytes(trainable, settings)
    gradients = FP32 * sum(trainable)
    persistent = {
        _weights_name(settings): shape.num_layers * _linear_bytes(shape, settings, compute),
        OTHER: other * (shape.num_parameters - shape.num_layers * shape.layer_linear_weights),
        ADAPTER: FP32 * sum(trainable),
        OPTIMIZER: optimizer,
        WORKSPACE: WORKSPACE_BYTES if settings.device == "cuda" else 0,
    }
    # trained in full means in fp32: what the embeddings return is, too, and with it the stream between the layers
    tied_head = settings.train_head and shape.tied
    stream = FP32 if settings.autocast and (settings.train_embeddings or tied_head) else other
    activations = _activation_settings(settings, targets, compute, stream)
    saved, one_layer = _saved_bytes(shape, settings, activations, tokens)
    carried = gradients if settings.gradient_accumulation > 1 else 0
    head_saved = FP32 * tokens * shape.vocab  # log-probabilities, kept for the backward pass
    # fp32 logits beside 16-bit ones; in fp32 a copy of the supervised positions
    head_forward = head_saved + (6 if compute < FP32 else 8) * tokens * shape.vocab
    head_backward = head_saved + 8 * tokens * shape.vocab  # gradients of the log-probabilities and of the logits
    head_weights = shape.vocab * shape.hidden
    trains_head = settings.train_head or (settings.train_embeddings and shape.tied)
    head_is_fp32 = settings.upcast or trains_head
    head_cast = compute * head_weights if settings.autocast and head_is_fp32 and compute < FP32 else 0
    # a trained head has its gradient before any layer has one: in the compute dtype first, and beside it in fp32
    head_gradient = FP32 * head_weights if trains_head else 0
    head_weight_backward = compute * tokens * shape.vocab + head_gradient + (head_cast if trains_head else 0)
    # with recompute the casts of the adapter live until autocast ends; without, `saved` has them
    recompute = settings.gradient_checkpointing
    casts = shape.num_layers * layer_cast_bytes(shape, activations) if recompute else 0
    cache = 2 * other * shape.kv_width * tokens * shape.num_layers
    with_cache = cache if settings.use_cache and not recompute else 0
    first_layer = saved // shape.num_layers  # what is left of `saved` when the backward pass reaches the first layer
    moments = {
        "loss": max(
            {HEAD: head_forward + head_cast, CACHE: with_cache, CASTS: casts},
            {HEAD: head_backward + head_cast},
            {HEAD: head_weight_backward + head_cast},
            key=lambda parts: sum(parts.values()),
        )
        | {GRADIENTS: carried, SAVED: saved},
        # at the last layer all is saved and no layer has a gradient yet; at the first it is the other way round
        "layers": max(
            {GRADIENTS: max(carried, head_gradient), SAVED: saved, LAYER: one_layer},
            {GRADIENTS: gradients, SAVED: first_layer, LAYER: one_layer},
            key=lambda parts: sum(parts.values()),
        ),
        "update": {GRADIENTS: gradients, "update temporaries": gradients if settings.optimizer == "adamw" else 0},
    }
    return _plan(shape.num_parameters, sum(trainable), persistent, moments, settings, host)


def _saved_bytes(
    shape: ModelShape, settings: TrainingMemory, activations: ActivationSettings, tokens: int
) -> tuple[int, int]:
    """Returns (what all layers keep until their backward pass, the temporaries of one layer's backward pass)."""
    layer = layer_token_bytes(shape, activations) * tokens + layer_cast_bytes(shape, activations)
    backward = layer_backward_bytes(shape, activations, tokens)
    if not settings.gradient_checkpointing:
        return shape.num_layers * layer, backward
    a_token = activations.stream_bytes * shape.hidden + kept_despite_recompute(shape, activations)
    final_norm = FP32 * shape.hidden * tokens
    mask = activations.compute_bytes * settings.row_tokens * tokens if activations.masked else 0
    return shape.num_layers * a_token * tokens + final_norm + mask, layer + backward


def _plan(
    num_parameters: int, num_trainable: int, persistent: Mapping[str, int],
    moments: Mapping[str, Mapping[str, int]], settings: TrainingMemory, host: int, reason: str | None = None,
) -> Plan:  # fmt: skip
    whole = {name: {k: v for k, v in {**persistent, **parts}.items() if v} for name, parts in moments.items()}
    peak = max(whole, key=lambda name: sum(whole[name].values()))
    if settings.device == "cuda":
        beside = {CONTEXT: CUDA_CONTEXT_BYTES, SLACK: round(ALLOCATOR_SLACK * sum(whole[peak].values()))}
    else:
        beside = {PROCESS: CPU_PROCESS_BYTES}
    notes = []
    if host:
        notes.append(f"{gib(host)} of optimiser states are paged: on the host when the device is full")
    if settings.device != "cuda":
        notes.append("on a CPU the figure is rough: page cache, fragmentation and the data come on top")
    return Plan(
        moments=whole, moment=peak, beside=beside, num_parameters=num_parameters, num_trainable=num_trainable,
        device=settings.device, host_bytes=host, reason=reason, notes=tuple(notes),
    )  # fmt: skip


def _lower_bound(settings: TrainingMemory, stored: Mapping[str, Sequence[int]], reason: str) -> Plan:
    """Returns the weights alone: matrices as small as the quantisation can make them, all else in the compute dtype."""
    a_weight = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}.get(settings.quantization, DTYPE_BYTES[settings.compute_dtype])
    matrices = other = 0
    for sizes in stored.values():
        count = 1
        for size in sizes:
            count *= size
        if len(sizes) == 2:
            matrices += count
        else:
            other += count
    parts = {_weights_name(settings): int(matrices * a_weight), OTHER: other * DTYPE_BYTES[settings.compute_dtype]}
    return _plan(matrices + other, 0, parts, {"weights alone": {}}, settings, 0, reason)


def _weights_name(settings: TrainingMemory) -> str:
    return "weights" if settings.quantization == "none" else WEIGHTS


def _linear_bytes(shape: ModelShape, settings: TrainingMemory, compute: int) -> int:
    """Returns the bytes of one layer's linear weights with their scales."""
    weights = shape.layer_linear_weights
    if settings.quantization == "none":
        return weights * compute
    if settings.quantization == "int8":
        return weights + FP32 * sum(shape.linear(name)[1] for name in LINEAR_NAMES)  # a scale for each output
    scales = weights // BLOCK_4BIT
    if not settings.double_quant:
        return weights // 2 + FP32 * scales
    tables = 7 * (3 * 512 + 1024)  # a 16-entry and a 256-entry code and an offset for each matrix, in blocks of 512
    return weights // 2 + scales + FP32 * scales // BLOCK_SCALES + tables


def _trainable_sizes(shape: ModelShape, settings: TrainingMemory, targets: tuple[str, ...]) -> list[int]:
    sizes = shape.adapter_sizes(settings.rank, targets, settings.dora)
    matrix = shape.vocab * shape.hidden
    if settings.train_embeddings or (settings.train_head and shape.tied):
        sizes.append(matrix)
    if settings.train_head and not shape.tied:
        sizes.append(matrix)
    return sizes


def _optimizer_bytes(sizes: Sequence[int], settings: TrainingMemory) -> tuple[int, int]:
    """Returns (bytes on the device, bytes in paged memory) of AdamW's two states."""
    device = paged = 0
    for size in sizes:
        in_8bit = settings.optimizer.endswith("8bit") and size >= MIN_8BIT_ELEMENTS
        states = 2 * size * (1 if in_8bit else FP32)
        if in_8bit:
            device += 2 * FP32 * (size // 256)  # one scale for 256 entries; never paged
        if settings.optimizer.startswith("paged") and size >= MIN_PAGED_ELEMENTS and settings.device == "cuda":
            paged += states
        else:
            device += states
    return device, paged


def _activation_settings(
    settings: TrainingMemory, targets: tuple[str, ...], compute: int, stream: int
) -> ActivationSettings:
    padded = settings.batch_size > 1 if settings.padded is None else settings.padded
    return ActivationSettings(
        row_tokens=settings.row_tokens, rank=settings.rank, targets=targets, quantization=settings.quantization,
        compute_bytes=compute, stream_bytes=stream, autocast=settings.autocast, attention=settings.attention,
        masked=settings.packed or padded, dropout=settings.dropout > 0, dora=settings.dora,
    )  # fmt: skip

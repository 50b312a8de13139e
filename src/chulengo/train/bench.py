"""What a training step costs here: the fast engine, the reference engine, and the machine's own limit.

All on one model, one set of tokens and one machine, in one command. The fast engine runs with the policies that
`train` would choose, unless others are asked for. Before anything is timed the engines' losses of
the first step, where a fresh adapter adds nothing, must agree: a fast step that computes something else is not fast.

The limit is what nobody can pass here: the time of the step's matrix products (forward, and the gradient of every
input) and of attention alone, each run back to back for a third of a second, so that a card at its power limit shows
the rate it can hold. A share of 100 % would mean that nothing else took any time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from chulengo.data.batches import IGNORE
from chulengo.errors import ChulengoError, ConfigError, DoesNotFitError
from chulengo.kernels import ops
from chulengo.model.llama_shape import REFERENCE
from chulengo.model.plan import device_memory, needed_bytes, predict_memory, training_memory
from chulengo.model.plan_fast import Policies
from chulengo.model.plan_policies import SETTING, Wanted
from chulengo.model.plan_shapes import LINEAR_NAMES, ModelShape
from chulengo.model.plan_speed import DeviceRates
from chulengo.train.engine import EngineChoice, choose_engine, load_model

FIRST_LOSSES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # nats that engines may differ by
FIRST_LOSS_FP8 = 0.1
LIMIT_SECONDS = 0.3
ROUNDS_AT_LEAST = 3
COPIED_BYTES = 1 << 28  # beyond every cache
HOST_BYTES = 1 << 26  # a state of 8,192 tokens of Llama 2 7B


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The work of one step.

    Attributes:
        device: where it runs.
        batch_size: sequences.
        seq_tokens: tokens of each; all but the first are supervised.
        rank: of LoRA on all linear maps; alpha is the same.
        quantization: nf4 or none.
        dtype: of products.
        policies: of the fast engine; None: it is not measured.
        recompute: the reference engine computes activations again.
        steps: timed ones.
        warm_up: steps before those.
    """

    device: torch.device
    batch_size: int
    seq_tokens: int
    rank: int
    quantization: str
    dtype: torch.dtype
    policies: Policies | None
    recompute: bool
    steps: int
    warm_up: int

    @property
    def fp8(self) -> bool:
        """Whether the fast engine's products are in FP8."""
        return self.policies is not None and self.policies.fp8


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How an engine did.

    Attributes:
        seconds: of every timed step, ascending.
        first_loss: nats a token before any update.
        peak_bytes: most memory allocated once warm; None without a GPU, where only the whole process is known.
    """

    seconds: tuple[float, ...]
    first_loss: float
    peak_bytes: int | None

    def quantile(self, share: float) -> float:
        """Returns the time below which this share of the steps lies, seconds."""
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


def plan_bench(
    config: Mapping[str, Any], wanted: Wanted, *, batch_size: int, seq_tokens: int, rank: int, quantization: str,
    dtype: torch.dtype, device: torch.device, fast: bool,
) -> tuple[EngineChoice, bool]:
    """Returns how `train` would run this step, and whether the reference engine has to compute activations again.

    Args:
        config: content of the model's `config.json`.
        wanted: policies of the fast engine, as the user wants them.
        batch_size: sequences.
        seq_tokens: tokens of each.
        rank: of LoRA on all linear maps.
        quantization: nf4 or none.
        dtype: of products.
        device: where it runs.
        fast: the fast engine is to be measured; else the choice is the reference engine.

    Raises:
        ConfigError: the fast engine does not cover this.
        DoesNotFitError: no policies of the fast engine fit.
    """
    plan: dict[str, Any] = {
        "quantization": quantization, "double_quant": True, "compute_dtype": _name(dtype), "attention": "sdpa",
        "rank": rank, "targets": ("all-linear",), "dora": False, "train_head": False, "train_embeddings": False,
        "batch_size": batch_size, "max_seq_tokens": seq_tokens, "optimizer": "adamw", "gradient_checkpointing": False,
        "precision": "auto", "dropout": 0.0, "gradient_accumulation": 1, "batching": "packed",
    }  # fmt: skip
    try:
        choice = choose_engine(
            "fast" if fast else "reference", config, policies=wanted, lora=_lora(rank), longest_row=seq_tokens,
            plan=plan, device=str(device),
        )
        choice.check_room()
    except DoesNotFitError as error:
        error.advise("a smaller --batch-size or --seq-tokens, or policies left to the plan")
        raise
    except ConfigError as error:
        given = next((name for name, setting in SETTING.items() if setting in (error.next_step or "")), "weights")
        error.advise("--engines reference" if error.next_step == REFERENCE else f"leave --{given} away")
        raise
    if wanted.activations != "auto":
        return choice, wanted.activations != "keep"
    memory = device_memory(str(device))
    kept = predict_memory(config, training_memory(device=memory, **plan))
    return choice, needed_bytes(kept) > memory.free_bytes


def time_fast(folder: Path, choice: EngineChoice, settings: StepSettings) -> StepTimes:
    """Returns the fast engine's times, as `train` would run it."""
    model = _loaded(folder, choice, settings)
    model.train()
    batch = _batch(settings, model.shape.sizes.vocab)
    graphs = settings.policies is not None and settings.policies.graphs
    return _times(
        lambda: model.nll(batch), model.trainable_parameters(), settings, clear=model.clear_gradients,
        # a graph's memory is counted while it is captured, in the second step
        counted_from=min(1, settings.warm_up) if graphs else settings.warm_up,
    )


def time_reference(folder: Path, choice: EngineChoice, settings: StepSettings) -> StepTimes:
    """Returns the reference engine's times: transformers, PEFT and bitsandbytes."""
    device = settings.device
    model = _loaded(folder, replace(choice, engine="reference", found=None), settings)
    from chulengo.model.adapter import enable_gradient_checkpointing  # after bitsandbytes: see `load_base`
    from chulengo.model.loss import supervised_nll

    if settings.recompute:
        enable_gradient_checkpointing(model)
    model.train()
    batch = {k: v.to(device) for k, v in _batch(settings, int(model.config.vocab_size)).items()}

    def loss() -> tuple[Tensor, int]:
        with torch.autocast(device.type, dtype=settings.dtype, enabled=settings.dtype != torch.float32):
            return supervised_nll(model, batch)

    return _times(
        loss, [p for p in model.parameters() if p.requires_grad], settings, clear=lambda: None,
        counted_from=settings.warm_up,
    )


def _loaded(folder: Path, choice: EngineChoice, settings: StepSettings) -> Any:
    model, _ = load_model(
        choice, folder, lora=_lora(settings.rank), seed=0, quantization=settings.quantization, double_quant=True,
        device=str(settings.device), attention="sdpa", cpu_threads=None, longest_row=settings.seq_tokens,
        name=str(folder), vocab_size=0,
    )
    return model


def _lora(rank: int) -> dict[str, Any]:
    return {
        "rank": rank, "alpha": float(rank), "dropout": 0.0, "targets": ("all-linear",), "rslora": False, "dora": False,
        "train_head": False, "train_embeddings": False,
    }  # fmt: skip


def check_same_loss(times: Mapping[str, StepTimes], settings: StepSettings) -> None:
    """Raises `ChulengoError` when the engines do not begin with the same loss, or one of them with no number."""
    losses = {name: found.first_loss for name, found in times.items()}
    said = ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
    if not all(map(math.isfinite, losses.values())):
        raise ChulengoError(
            f"The loss before the first update is not finite: {said}.",
            next_step="another --dtype, or look for NaN in the model's weights",
        )
    allowed = FIRST_LOSS_FP8 if settings.fp8 else FIRST_LOSSES[settings.dtype]
    if max(losses.values()) - min(losses.values()) > allowed:
        raise ChulengoError(
            f"The engines do not compute the same loss before the first update: {said}.",
            allowed=f"a difference of up to {allowed} nats a token",
            next_step="report this with the model's config.json: the times would compare different things",
        )


def limit_seconds(shape: ModelShape, settings: StepSettings) -> dict[str, float]:
    """Returns the least time of a step's parts here, in seconds: products, head, attention.

    Args:
        shape: of the model.
        settings: of the step.
    """
    device, fp8 = settings.device, settings.fp8
    tokens, dtype = settings.batch_size * settings.seq_tokens, settings.dtype

    def product(rows: int, features: int, outputs: int, *, eighth: bool) -> float:
        x, w = _noise((rows, features), dtype, device), _noise((outputs, features), dtype, device)
        if not eighth:
            return sustained(lambda: x @ w.t(), device)
        kernels = ops.implementation("fp8", x)
        operands = (*kernels.quantize_rows(x), *kernels.quantize_rows(w), dtype)
        return sustained(lambda: kernels.product(*operands), device)

    def both_ways(inputs: int, outputs: int, *, eighth: bool = False) -> float:
        return product(tokens, inputs, outputs, eighth=eighth) + product(tokens, outputs, inputs, eighth=eighth)

    maps: dict[tuple[int, int], int] = {}
    for name in LINEAR_NAMES:
        maps[shape.linear(name)] = maps.get(shape.linear(name), 0) + 1
    products = sum(count * both_ways(*sizes, eighth=fp8) for sizes, count in maps.items()) * shape.num_layers
    size = (settings.batch_size, shape.num_heads, settings.seq_tokens, shape.head_dim)
    q, k, v = (_noise(size, dtype, device).requires_grad_() for _ in range(3))
    grad = _noise(size, dtype, device)

    def attention() -> None:
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), grad)

    return {
        "products": products, "head": both_ways(shape.hidden, shape.vocab),
        "attention": sustained(attention, device) * shape.num_layers,
    }  # fmt: skip


def sustained(run: Callable[[], object], device: torch.device) -> float:
    """Returns the mean time of a call in seconds, over at least a third of a second of calls back to back."""
    run()
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    rounds = max(ROUNDS_AT_LEAST, math.ceil(LIMIT_SECONDS / max(time.perf_counter() - begin, 1e-5)))
    begin = time.perf_counter()
    for _ in range(rounds):
        run()
    _wait(device)
    return (time.perf_counter() - begin) / rounds


def measured_rates(device: torch.device) -> DeviceRates:
    """Returns what a GPU does when it does nothing else; takes some two seconds and half a gigabyte."""
    x, w = (_noise(size, torch.bfloat16, device) for size in ((8192, 4096), (11008, 4096)))
    products = 2 * 8192 * 4096 * 11008 / sustained(lambda: x @ w.t(), device)
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPIED_BYTES / sustained(lambda: target.copy_(source), device)  # read and written
    host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    rows = source[:HOST_BYTES]
    slower = max(sustained(lambda: host.copy_(rows, non_blocking=True), device),
                 sustained(lambda: rows.copy_(host, non_blocking=True), device))  # fmt: skip
    return DeviceRates(products, copied, HOST_BYTES / slower, "at rates measured here")


def _times(
    loss_of: Callable[[], tuple[Tensor, int]], parameters: list[torch.nn.Parameter], settings: StepSettings, *,
    clear: Callable[[], None], counted_from: int,
) -> StepTimes:  # fmt: skip
    device = settings.device
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    seconds: list[float] = []
    first_loss = math.nan
    for index in range(settings.warm_up + settings.steps):
        if index == counted_from and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _wait(device)
        begin = time.perf_counter()
        nll, count = loss_of()
        loss = nll / count
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clear()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        if index == 0:
            first_loss = float(loss.detach())
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepTimes(tuple(sorted(seconds[settings.warm_up :])), first_loss, peak)


def _batch(settings: StepSettings, vocab: int) -> dict[str, Any]:
    size = (settings.batch_size, settings.seq_tokens)
    ids = torch.randint(3, vocab, size, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def _noise(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, dtype=torch.float32, device=device).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

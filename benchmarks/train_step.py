"""Times one training step of the fast engine on random weights in the shape of a Llama 2 model.

Random weights have the cost of trained ones: no kernel's time depends on values. They are made on the device, one
layer at a time, so nothing is read from a disk. Every variant is one JSON line: median step, tokens a second, peak
memory, and with --profile the time of each kind of kernel.

    PYTHONPATH=src python benchmarks/train_step.py --weights resident --activations keep
    PYTHONPATH=src python benchmarks/train_step.py --weights stream --activations full --batch 1 --seq 512
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chulengo.kernels.reference import nf4
from chulengo.model.allocator import OwnMemory, let_segments_grow
from chulengo.model.fast import FastModel, load_fast
from chulengo.model.linear_group import Matrices
from chulengo.model.llama_shape import LlamaShape, read_llama_shape
from chulengo.model.llama_weights import LlamaWeights, read_layer
from chulengo.model.packed_inputs import PackedInputs

SHAPES = {
    "7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40), "70b": (8192, 28672, 80, 64, 8),
    "tiny": (256, 512, 2, 4, 2),
}  # fmt: skip


def shape_of(name: str, layers: int | None, context: int) -> LlamaShape:
    """Returns a model's shape, with another number of layers on request."""
    hidden, intermediate, num_layers, heads, kv_heads = SHAPES[name]
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": 32000,
        "num_hidden_layers": layers or num_layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5, "max_position_embeddings": context, "tie_word_embeddings": False,
    }  # fmt: skip
    return read_llama_shape(config, max_seq_tokens=context)


class RandomTensors:
    """Gives normal values where `model.nf4_weights.StoredTensors` gives a file's."""

    def __init__(
        self, device: torch.device, *, quantize: bool, dtype: torch.dtype, lasting: OwnMemory
    ) -> None:
        """Seeds its own generator."""
        self.device, self.quantize, self.dtype, self.lasting = device, quantize, dtype, lasting
        self.generator = torch.Generator(device).manual_seed(0)

    def plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns ones for a norm, else values with the spread that transformers begins with."""
        return self.lasting.keep(self._made(shape))

    def _made(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(0, 0.02, generator=self.generator)

    def linear(self, name: str, shape: tuple[int, int]) -> nf4.NF4Weight | Tensor:
        """Returns a weight, in NF4 when asked for."""
        weight = self._made(shape)
        if not self.quantize:
            return self.lasting.keep(weight)
        return nf4.quantize(weight, double_quant=True).placed(self.lasting.keep)

    def linears(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]]
    ) -> tuple[list[nf4.NF4Weight | Tensor], Tensor | None]:
        """Returns the weights of maps with one input, and the matrix whose rows they are where none is quantised."""
        if self.quantize or len(names) == 1:
            return [self.linear(name, shape) for name, shape in zip(names, shapes, strict=True)], None
        joined_OI = self.lasting.keep(self._made((sum(rows for rows, _ in shapes), shapes[0][1])))
        return list(torch.split(joined_OI, [rows for rows, _ in shapes])), joined_OI


def random_model(shape: LlamaShape, device: torch.device, *, weights: str, activations: tuple[str, ...],
                 dtype: torch.dtype, host_embeddings: bool = False, graphs: bool = False,
                 backend: str = "auto") -> FastModel:  # fmt: skip
    """Returns a model of random weights."""
    lasting = OwnMemory(device)
    moves = weights == "resident-fp8"  # what leaves the device again is not kept apart
    loading = OwnMemory(torch.device("cpu")) if moves else lasting
    stored: Any = RandomTensors(device, quantize=True, dtype=dtype, lasting=loading)
    sizes = shape.sizes
    layers = [read_layer(stored, shape, index) for index in range(sizes.num_layers)]
    vocabulary = (sizes.vocab, sizes.hidden)
    loaded = LlamaWeights(stored.plain("", vocabulary), layers, stored.plain("", (sizes.hidden,)),
                          stored.plain("", vocabulary))  # fmt: skip
    if host_embeddings:
        loaded.embedding_VD = loaded.embedding_VD.cpu()
    matrices = Matrices(policy=weights, dtype=dtype, backend=backend, lasting=lasting)
    return FastModel(loaded, shape, matrices, name="random", device=device, activations=activations, backend=backend,
                     graphs=graphs)  # fmt: skip


def full_inputs(batch: int, seq: int, vocab: int, device: torch.device, supervised: float) -> PackedInputs:
    """Returns `batch` sequences of `seq` random tokens, a share of them supervised."""
    generator = torch.Generator().manual_seed(0)
    tokens = batch * seq
    ids = torch.randint(3, vocab, (tokens,), generator=generator)
    position = torch.arange(seq, dtype=torch.int32).repeat(batch)
    places = (position != seq - 1) & (torch.rand(tokens, generator=generator) < supervised)
    place = places.nonzero().flatten()
    ends = torch.arange(0, tokens + 1, seq, dtype=torch.int32)
    inputs = PackedInputs(ids, position, ends, seq, place, ids[place + 1], len(place))
    return inputs if device.type == "cpu" else inputs.to(device)


def optimizer_of(name: str, parameters: list[Any]) -> Any:
    """Returns the optimiser."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW8bit if name.startswith("paged") else bitsandbytes.optim.AdamW8bit
    return kind(parameters, lr=1e-4)


def model_of(arguments: argparse.Namespace, device: torch.device, shape: LlamaShape) -> FastModel:
    """Returns the model with a fresh adapter: of a folder, or of random weights."""
    policies = arguments.activations.split("+")  # "keep+full": keep in the first --first layers
    num_layers = shape.sizes.num_layers
    first = num_layers if len(policies) == 1 else arguments.first
    activations = (policies[0],) * first + (policies[-1],) * (num_layers - first)
    if arguments.model:
        model = load_fast(
            Path(arguments.model), weights=arguments.weights, activations=activations, graphs=arguments.graphs,
            embeddings="host" if arguments.host_embeddings else "device", max_seq_tokens=shape.max_seq_tokens,
        )  # fmt: skip
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = random_model(shape, device, weights=arguments.weights, activations=activations, dtype=dtype,
                             host_embeddings=arguments.host_embeddings, graphs=arguments.graphs)  # fmt: skip
    model.attach_lora(
        rank=arguments.rank, alpha=arguments.rank, dropout=arguments.dropout, dora=arguments.dora, form=arguments.form
    )
    model.train()
    return model


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one variant and returns its row."""
    device = torch.device(arguments.device)
    shape = shape_of(arguments.shape, arguments.layers, max(arguments.seq, 2048))
    model = model_of(arguments, device, shape)
    # where the table is on the host, so are the ids, as a data loader has them
    place = torch.device("cpu") if arguments.host_embeddings else device
    inputs = full_inputs(arguments.batch, arguments.seq, shape.sizes.vocab, place, arguments.supervised)
    parameters = model.trainable_parameters()
    optimizer = optimizer_of(arguments.optimizer, parameters)

    def step() -> Tensor:
        nll, count = model.nll(inputs)
        loss = nll / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # a graph's memory is counted while it is captured, in the second step
    row = {
        "engine": "fast", "shape": arguments.shape, "layers": shape.sizes.num_layers, "batch": arguments.batch,
        "seq": arguments.seq, "rank": arguments.rank, "weights": arguments.weights,
        "activations": arguments.activations, "first": arguments.first, "form": arguments.form,
        "host_embeddings": arguments.host_embeddings, "dropout": arguments.dropout, "dora": arguments.dora,
        "graphs": arguments.graphs, "optimizer": arguments.optimizer, "supervised": arguments.supervised,
        **timed(step, arguments, reset_after=1 if arguments.graphs else arguments.warm),
    }  # fmt: skip
    if arguments.profile:
        profile(step, arguments.profile)
    return row


def timed(step: Callable[[], Tensor], arguments: argparse.Namespace, reset_after: int) -> dict[str, Any]:
    """Runs the warm-up and the timed steps; returns their times, tokens a second, losses and peak memory."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    times, losses = [], []
    for index in range(arguments.warm + arguments.steps):
        if on_gpu:
            torch.cuda.synchronize()
            if index == reset_after:
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        losses.append(round(float(loss), 5))
    kept = sorted(times[arguments.warm :])
    median = kept[len(kept) // 2]
    row: dict[str, Any] = {
        "step_s": round(median, 4), "min_s": round(kept[0], 4), "max_s": round(kept[-1], 4),
        "tokens_per_s": round(arguments.batch * arguments.seq / median), "first_step_s": round(times[0], 2),
        "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip
    if on_gpu:
        row |= {
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        }  # fmt: skip
    return row


def profile(step: Any, lines: int) -> None:
    """Prints the device time of one step by kernel, and how long the device was idle."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as traced:
        step()
        torch.cuda.synchronize()
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    events = [e for e in traced.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        entry = total[re.sub(r"<.*", "", event.name)[:90]]
        entry[0] += 1
        entry[1] += event.time_range.elapsed_us()
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(value for _, value in total.values())
    print(f"device: {span / 1e3:.1f} ms span, {busy / 1e3:.1f} ms busy, {len(events)} kernels")
    for name, (count, microseconds) in sorted(total.items(), key=lambda pair: -pair[1][1])[:lines]:
        print(f"{microseconds / 1e3:9.2f} ms {count:6.0f} x {microseconds / count:8.1f} us  {name}")


def main() -> None:
    """Runs one variant."""
    let_segments_grow()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--model", help="a folder with weights of this shape; without it they are random")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--form", default="auto")
    parser.add_argument("--weights", default="stream")
    parser.add_argument("--activations", default="keep")
    parser.add_argument("--host-embeddings", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--supervised", type=float, default=1.0)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw_8bit", "paged_adamw_8bit"))
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="append the row to this file")
    arguments = parser.parse_args()
    row = measure(arguments)
    print("ROW", json.dumps(row), flush=True)
    if arguments.out:
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

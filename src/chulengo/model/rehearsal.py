"""A training step of a few tokens that leaves nothing behind, so that its kernels are compiled before the first step.

It goes through two layers of every activations policy (the second one's input needs a gradient, and has a residual
stream). They are twins of the model's: the same frozen weights, and all else their own, which is copies of factors,
gradients, kept matrices and buffers. So it does not matter that their numbers are whatever memory held while kernels
were missing, and nobody has to put anything back. Numbers that choose places (tokens, positions, targets, ends of
sequences) come from the host.

Kernels do not depend on how many tokens there are. One that the rehearsal did not meet is compiled when it is launched.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from chulengo.data.batches import IGNORE
from chulengo.model.linear_group import Factors, LinearGroup, Matrices
from chulengo.model.llama import Pass, summed_nll
from chulengo.model.llama_weights import LlamaLayer, LlamaWeights
from chulengo.model.offload import HostStates
from chulengo.model.packed_inputs import PackedInputs, pack_batch

TOKENS = 32  # of the longer of two sequences
LAYERS = 2  # of every policy
# by one worker 10 kernels in bf16 took 4.6 s and 21 in FP8 12.9; by 3: 2.0 and 5.4, by 6: 1.4 and 3.4 (H200, 16 cores).
# Many more wait for Python's lock: on two cores 23 kernels took 7.3 s by one, 3.7 by two, 6.6 by 16
MOST_WORKERS = 6


def few_tokens(most: int) -> PackedInputs:
    """Returns two sequences of unequal lengths, the longer one of at most `most` tokens, on the CPU."""
    length = min(TOKENS, most)
    ids = torch.zeros((2, length), dtype=torch.int64)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, 0] = IGNORE
    mask[1, -1] = 0
    return pack_batch({"input_ids": ids, "labels": labels, "attention_mask": mask})


def compile_step(weights: LlamaWeights, run: Pass, activations: Sequence[str]) -> int:
    """Compiles the fused kernels of a training step, side by side; returns how many.

    Args:
        weights: of the model, with an adapter.
        run: of a few tokens, on a CUDA device.
        activations: the policy of each layer.
    """
    from chulengo.kernels.fused.compile_ahead import compiled_ahead  # imports Triton

    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    try:
        return compiled_ahead(lambda: rehearse(weights, run, activations), workers)
    finally:
        torch.cuda.empty_cache()


@contextmanager
def beside(*tasks: Callable[[], None]) -> Iterator[None]:
    """Runs each task in a thread of its own while the block runs; they are done when it ends, or raise."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        running = [pool.submit(task) for task in tasks]
        yield
        for task in running:
            task.result()


def rehearse(weights: LlamaWeights, run: Pass, activations: Sequence[str]) -> None:
    """Runs the refresh of the adapter's copies, forward and backward; see above."""
    given = run.matrices
    matrices = Matrices(policy=given.policy, dtype=given.dtype, backend=given.backend)
    matrices.form = given.form
    device = run.cos_SP.device
    places = [i for policy in dict.fromkeys(activations) for i in _first(activations, policy)]
    layers = [_layer(weights.layers[i], device) for i in sorted(places)]
    twin = dataclasses.replace(weights, layers=layers)
    run = dataclasses.replace(run, matrices=matrices, host=HostStates(device))
    with torch.enable_grad():
        matrices.refresh(twin.groups())
        nll = summed_nll(twin, run, [activations[layer.index] for layer in layers])
        if nll.requires_grad:
            nll.backward()  # type: ignore[no-untyped-call]


def _first(activations: Sequence[str], policy: str) -> list[int]:
    return [index for index, own in enumerate(activations) if own == policy][:LAYERS]


def _layer(layer: LlamaLayer, device: torch.device) -> LlamaLayer:
    qkv, o, gate_up, down = (_group(group, device) for group in layer.groups)
    return dataclasses.replace(layer, qkv=qkv, o=o, gate_up=gate_up, down=down)


def _group(group: LinearGroup, device: torch.device) -> LinearGroup:
    weights = [weight.to(device) for weight in group.weights]  # FP8 may have moved them to the host
    factors = [None if pair is None else Factors(*map(_copy, pair.parameters())) for pair in group.factors]
    return LinearGroup(group.names, weights, group.bias_O, factors)


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)

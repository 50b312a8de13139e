"""Forward and backward of a micro-batch as one CUDA graph.

A step of Llama 2 7B launches some 3,500 kernels. At 512 tokens they run for 66 ms, and launching them takes the host
350 ms (H200). A graph is launched once: the host's time is gone, whatever the batch. It is tied to shapes, so a batch
is filled up to the next of few sizes: its tokens (with sequences that nobody looks at), its sequences (empty ones) and
its targets (ignored ones). The first batch of a size runs without a graph, which compiles kernels; the second is
captured; from then on it is replayed. At most `MOST_GRAPHS` are captured, and none for which the device has no room:
batches of rarer sizes go on without. The first one runs on the stream of the capture: where a node of autograd's is
still there when the capture begins (somebody holds a loss, or the backward's thread is late), it is met again, and a
capture cannot wait for another stream's.

All graphs share one memory, which is theirs as long as they are, and between two replays nothing in it is wanted. So a
pass without a graph (the first of a size, or one that validates) takes its memory from there too (`StepGraphs.room`):
beside it, a run would need that of a step twice.

A replay computes gradients of the summed loss itself at once, before anybody knows what it will be divided by;
`backward` multiplies them by what comes. So one replay belongs to one backward: a second replay before it would
overwrite them, which is an error here.

Dropout masks are computed from a number of the micro-step in the device's memory. A replay is given the number of its
own micro-step, and draws the masks that the step would have had without a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chulengo.errors import ModelError
from chulengo.model.allocator import OwnMemory
from chulengo.model.flat_factors import FlatFactors
from chulengo.model.graph_capture import captured
from chulengo.model.packed_inputs import PackedInputs
from chulengo.model.step_sizes import LEAST_STEP, MOST_GRAPHS, filled_up, size_step

SEQUENCE_STEP = 32

Key = tuple[int, ...]
# (inputs on the device, embeddings or None, number of the dropout masks or None) -> the summed loss, differentiable
Loss = Callable[[PackedInputs, Tensor | None, Tensor | None], Tensor]


@dataclass(slots=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: PackedInputs
    optional: tuple[Tensor | None, Tensor | None]  # embeddings, number of the dropout masks
    nll: Tensor


class RepeatedWork:
    """Work on the same tensors again and again, which writes where it wrote before, as a graph on a CUDA device.

    After an optimiser step of Llama 2 7B in FP8, 384 small kernels bring the adapter's copies up to date; launched one
    by one they would keep the device waiting for the host.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        """Runs nothing yet."""
        self._work = work
        self._key = -1
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, key: int, *, graph: bool) -> None:
        """Runs the work: as it is when `key`, which stands for the tensors it writes, has changed, else as a graph."""
        if key != self._key or not graph:
            self._key, self._graph = key, None
            self._work()
            return
        if self._graph is None:
            fresh = torch.cuda.CUDAGraph()
            with captured(fresh):
                self._work()
            self._graph = fresh
        self._graph.replay()


class StepGraphs:
    """The graphs of one model, by the shapes of the batch."""

    def __init__(self, flat: FlatFactors, loss: Loss, broken_off: Callable[[], None] | None = None) -> None:
        """Captures nothing yet.

        Args:
            flat: the factors whose gradients are made.
            loss: of a batch.
            broken_off: called after a pass that did not end; None: nothing is left of one.
        """
        self._flat, self._loss, self._broken_off = flat, loss, broken_off
        # capture and everything before it happen on one stream: nodes of autograd belong to the one they were made on
        self._stream = torch.cuda.Stream(flat.parameter.device) if flat.parameter.is_cuda else None  # type: ignore[no-untyped-call]
        self._seen: set[Key] = set()
        self._captured: dict[Key, _Captured] = {}
        self._embedded: Tensor | None = None
        self._room_for_more = True
        self._gradient: Tensor | None = None
        self._memory = OwnMemory(flat.parameter.device)
        self.serial = 0

    def nll(self, inputs: PackedInputs, embedded_TD: Tensor | None, seed_1: Tensor | None) -> Tensor:
        """Returns the summed loss of a batch, differentiable once.

        Args:
            inputs: on the device, filled up by `filled`.
            embedded_TD: the tokens' embeddings, where the table is on the host.
            seed_1: of the dropout masks, int64 [1] on the device; None: no dropout.
        """
        key = (len(inputs.ids_T), len(inputs.cu_seqlens), inputs.max_seqlen, len(inputs.target_N))
        if self._gradient is None:
            self._gradient = torch.empty_like(self._flat.parameter)
        self._flat.release(self._gradient)
        step = self._captured.get(key)
        if step is not None:
            step.inputs.copy_(inputs)
            for place, value in zip(step.optional, (embedded_TD, seed_1), strict=True):
                if place is not None and value is not None:
                    place.copy_(value)
        elif key in self._seen and self._room_for_more:
            step = self._captured_now(key, inputs, embedded_TD, seed_1)
        if step is not None:
            step.graph.replay()
            nll = step.nll
        else:
            nll = self._eager(inputs, embedded_TD, seed_1, key in self._seen)
            self._seen.add(key)
        self.serial += 1
        differentiable: Tensor = _Replayed.apply(self._flat.parameter, nll, self)  # type: ignore[no-untyped-call]
        return differentiable

    def add_gradients(self, serial: int, factor: Tensor) -> None:
        """Adds the last replay's gradients, times a factor, to the parameters'."""
        if serial != self.serial:
            raise ModelError(
                "A backward came after another batch's forward, whose graph has overwritten its gradients.",
                next_step="call backward for each batch before the next one",
            )
        assert self._gradient is not None
        self._flat.add_gradients(self._gradient, factor)

    @contextmanager
    def room(self) -> Iterator[None]:
        """Runs a pass in the graphs' memory and on their stream; what it returns has to be copied outside."""
        if self._stream is None:
            yield
            return
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        try:
            with torch.cuda.stream(self._stream), self._memory.held():
                yield
        finally:
            around.wait_stream(self._stream)

    def _eager(
        self, inputs: PackedInputs, embedded_TD: Tensor | None, seed_1: Tensor | None, seen: bool
    ) -> Tensor:
        if self._stream is not None and not seen:
            torch.cuda.empty_cache()  # the graphs' memory cannot take what PyTorch keeps of other
        with self.room():
            nll = self._run(inputs, embedded_TD, seed_1)
        return nll.clone()

    def _run(self, inputs: PackedInputs, embedded_TD: Tensor | None, seed_1: Tensor | None) -> Tensor:
        """Makes the gradients of a batch in the tensor for them; returns its summed loss, without a graph.

        On the calling thread, the first time and in the capture: a thread of the backward's own would take its memory
        elsewhere, and what libraries make for each thread, such as cuDNN's handle, cannot be made in a capture.
        """
        assert self._gradient is not None, "made before: it stays"
        here = torch.autograd.set_multithreading_enabled(False)
        with here, torch.enable_grad(), self._flat.gradients_in(self._gradient):
            self._gradient.zero_()
            nll = self._loss(inputs, embedded_TD, seed_1)
            _forget_workspaces(self._gradient)
            nll.backward()  # type: ignore[no-untyped-call]
        return nll.detach()

    def _captured_now(
        self, key: Key, inputs: PackedInputs, embedded_TD: Tensor | None, seed_1: Tensor | None
    ) -> _Captured | None:
        """Returns a new graph, None where the device has no room for it: from then on there will be no more of them."""
        try:
            step = self._captured[key] = self._capture(inputs, embedded_TD, seed_1)
        except torch.OutOfMemoryError:
            self._room_for_more = False
            warnings.warn(
                f"The device has no room for more than {len(self._captured)} CUDA graphs: batches of other sizes run "
                "without one. The same numbers, slower; a smaller training.batch_size leaves room.", stacklevel=2,
            )  # fmt: skip
            if self._broken_off is not None:
                self._broken_off()
            return None
        self._room_for_more = len(self._captured) < MOST_GRAPHS
        return step

    def _capture(self, inputs: PackedInputs, embedded_TD: Tensor | None, seed_1: Tensor | None) -> _Captured:
        inputs = inputs.clone()
        if embedded_TD is not None:  # one place for all graphs, 64 MiB for 8,192 tokens of Llama 2 7B
            if self._embedded is None or len(self._embedded) < len(embedded_TD):
                self._embedded = torch.empty_like(embedded_TD)
            embedded_TD = self._embedded[: len(embedded_TD)].copy_(embedded_TD)
        seed_1 = None if seed_1 is None else seed_1.clone()
        graph = torch.cuda.CUDAGraph()
        _forget_workspaces(self._flat.parameter)
        with captured(graph, pool=self._memory.pool, stream=self._stream):
            nll = self._run(inputs, embedded_TD, seed_1)
        return _Captured(graph, inputs, (embedded_TD, seed_1), nll)


def _forget_workspaces(on: Tensor) -> None:
    """Gives back what cuBLAS holds, 32 MiB a stream and thread: a graph is to have its own, in its memory.

    Work that was queued comes before whatever takes the memory next.
    """
    if on.is_cuda:
        torch._C._cuda_clearCublasWorkspaces()


def filled(inputs: PackedInputs, most: int) -> PackedInputs:
    """Returns a batch filled up to one of few sizes, so that few graphs serve a run.

    Equally long sequences that are a multiple of 256 together stay as they are: attention is faster for those.

    Args:
        inputs: the batch.
        most: tokens of the longest sequence that the model takes.
    """
    tokens, sequences = len(inputs.ids_T), len(inputs.cu_seqlens) - 1
    step = size_step(tokens)
    is_equal = tokens % LEAST_STEP == 0 and tokens == sequences * inputs.max_seqlen
    to = tokens if is_equal else filled_up(tokens, step)
    # quarters of the tokens, so that batches of as many tokens have few sizes; the head is a small part of a step
    targets = min(filled_up(len(inputs.target_N), filled_up(to // 4, LEAST_STEP)), to)
    if is_equal:
        return inputs.filled(to, sequences, targets, inputs.max_seqlen)
    longest = min(filled_up(inputs.max_seqlen, step), most)
    # the filling itself is one sequence or more, none longer than the longest
    return inputs.filled(to, filled_up(sequences + 1 + (to - tokens) // longest, SEQUENCE_STEP), targets, longest)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, nll: Tensor, graphs: StepGraphs) -> Tensor:
        ctx.graphs, ctx.serial = graphs, graphs.serial
        return nll.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor) -> Any:
        ctx.graphs.add_gradients(ctx.serial, dnll)
        return None, None, None

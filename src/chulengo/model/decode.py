"""The fast engine's decoding: prompts into a key/value cache, then one token of every row at a time.

Prompts are read packed, without padding, as training reads its rows, so a prompt's numbers do not know the batch it is
in. Keys (turned by their positions already) and values of every token go into the cache, [rows, key heads, places,
head size] a layer, at the row and position they belong to. A step then attends from one query a row to that row's
places up to its own; the mask is one comparison of places with positions, made once for all layers. The head sees the
last state of each row and nothing else.

Query heads that share a key head stand behind each other, so `q.view(B, K, G, H)` makes them the queries of one
attention over K heads: no key is repeated in memory, and any attention kernel takes it.

The cache grows by blocks of places, and rows leave it by a copy; both are rare. Between two of these every step has the
same shapes and the same memory, and nothing in it waits for the device, so on a GPU it is a CUDA graph, one for each
(rows, places): the first step of a size runs plainly (kernels are compiled), the second is captured, from then on it is
replayed. That saves the host's time for launching. Memory and graphs stay with the model for its next batches
(`StepMemory`), since an answer of ten tokens would not repay a capture of its own. On a CPU there is no graph, and
attention reads the places that are in use only.

Limits. A row that has ended, but has not left yet, is computed with the others; at the model's last position it stays
there, and its logits mean nothing. The cache holds every place of the longest row for all rows: who makes batches asks
`places_for` how many those are, and keeps within what `model.cache_room` allows.

Legend: T tokens of all prompts, B rows, S places, N query heads, K key heads, G = N / K, H head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from chulengo.kernels import ops
from chulengo.model.graph_capture import captured
from chulengo.model.llama import Attention
from chulengo.model.packed_inputs import PackedInputs, pack_sequences
from chulengo.model.plan_shapes import ModelShape

PLACE_STEP = 256  # the cache's places are a multiple of it
PROMPT_TOKENS = 8192  # prompts are read so many tokens at a time; a longer one alone
MOST_GRAPHS = 32
STEP_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # on a GPU: those that take a mask

Size = tuple[int, int]  # rows, places
# (inputs on the device, attention, places or None for all tokens) -> logits [N, V]
Forward = Callable[[PackedInputs, Attention, Tensor | None], Tensor]


def cache_bytes(sizes: ModelShape, dtype: torch.dtype, num_tokens: int) -> int:
    """Returns the bytes that a cache of this many tokens takes, of all rows together."""
    return 2 * sizes.num_layers * sizes.kv_width * num_tokens * dtype.itemsize


def places_for(num_tokens: int) -> int:
    """Returns how many places of the cache a row of so many tokens takes, in a batch with none longer."""
    return -(-num_tokens // PLACE_STEP) * PLACE_STEP


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits_BV: Tensor


class StepMemory:
    """What steps read and write: the cache of each layer, one token and one position a row, and the steps' graphs.

    Views of any (rows, places) lie in the same memory, so what is captured stays valid until the memory has to grow.
    """

    def __init__(self, sizes: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        """Takes no memory yet."""
        self._sizes = sizes
        self._caches = [torch.empty(0, dtype=dtype, device=device) for _ in range(2 * sizes.num_layers)]  # flat
        self._ids = self._positions = torch.empty(0, dtype=torch.int64, device=device)
        self._seen: set[Size] = set()
        self._captured: dict[Size, _Captured] = {}
        self._pool: Any = None

    def make_room(self, size: Size) -> None:
        """Grows where so many rows of so many places are more than there was room for; what is there stays."""
        rows, elements = size[0], size[0] * size[1] * self._sizes.kv_width
        more_rows, more = rows - len(self._ids), elements - len(self._caches[0])
        if more_rows > 0:
            self._ids, self._positions = pad(self._ids, (0, more_rows)), pad(self._positions, (0, more_rows))
        if more > 0:
            for index in range(len(self._caches)):  # one at a time is there twice
                self._caches[index] = pad(self._caches[index], (0, more))
        if more_rows > 0 or more > 0:
            self.forget_graphs()

    def views(self, size: Size) -> StepViews:
        """Returns the parts that so many rows of so many places use; there is room for them."""
        shape = (size[0], self._sizes.num_kv_heads, size[1], self._sizes.head_dim)
        caches = [cache[: math.prod(shape)].view(shape) for cache in self._caches]
        layers = self._sizes.num_layers
        return StepViews(caches[:layers], caches[layers:], self._ids[: size[0]], self._positions[: size[0]])

    def run(self, size: Size, advance: Callable[[], Tensor]) -> Tensor:
        """Returns what a step gives, run plainly the first time of a size, then as a graph; valid until the next step.

        Args:
            size: rows and places.
            advance: the step, on the views of that size.
        """
        if size not in self._seen:
            logits_BV = advance()
            self._seen.add(size)
            return logits_BV
        step = self._captured.get(size)
        if step is None:
            if len(self._captured) == MOST_GRAPHS:  # each holds some memory of the device
                self._captured.clear()
                self._pool = None
            graph = torch.cuda.CUDAGraph()
            with captured(graph, pool=self._pool):
                logits_BV = advance()
            self._pool = graph.pool()
            step = self._captured[size] = _Captured(graph, logits_BV)
        step.graph.replay()
        return step.logits_BV

    def forget_graphs(self) -> None:
        """Drops the graphs: memory that they read has moved."""
        self._seen.clear()
        self._captured.clear()
        self._pool = None

    @property
    def num_graphs(self) -> int:
        """How many sizes have been captured."""
        return len(self._captured)


@dataclass(frozen=True, slots=True, eq=False)
class StepViews:
    """The memory of one batch: keys and values [B, K, S, H] of each layer, tokens and positions [B]."""

    keys: list[Tensor]
    values: list[Tensor]
    ids_B: Tensor
    position_B: Tensor


class FastDecoding:
    """A batch in the middle of its answers; `generate.decoding.Decoding` says what each method is for."""

    def __init__(
        self, forward: Forward, sizes: ModelShape, memory: StepMemory, *, max_tokens: int, device: torch.device,
        backend: str, graphs: bool, prompt_tokens: int | None = None,
    ) -> None:
        """Holds nothing yet.

        Args:
            forward: of the model.
            sizes: of the model.
            memory: for this batch alone, until it is done with.
            max_tokens: of a row, prompt and answer.
            device: of the model.
            backend: of the kernels.
            graphs: replay steps as CUDA graphs.
            prompt_tokens: prompts are read at most so many tokens at a time, but always one; None: `PROMPT_TOKENS`.
        """
        self._forward, self._sizes, self._memory, self._max_tokens = forward, sizes, memory, max_tokens
        self._device, self._backend, self._graphs = device, backend, graphs
        self._most_read = PROMPT_TOKENS if prompt_tokens is None else min(PROMPT_TOKENS, prompt_tokens)
        self._lengths: list[int] = []  # tokens of each row
        self._size = (0, 0)

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """Returns the prompt."""
        return prompt

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts; returns the logits of each row's next token, [B, V]."""
        self._lengths = [len(prompt) for prompt in prompts]
        self._size = (len(prompts), self._places())
        self._memory.make_room(self._size)
        views = self._memory.views(self._size)
        for cache_BKSH in (*views.keys, *views.values):
            # a place that the mask hides is still multiplied, by 0, and must be finite for that
            cache_BKSH.zero_()
        logits_BV = torch.cat([self._read(prompts, rows, views) for rows in self._parts()])
        views.position_B.copy_(torch.tensor(self._lengths).clamp(max=self._max_tokens - 1))
        return logits_BV

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to every row; returns the logits of the token after it, [B, V], until the next step."""
        self._lengths = [length + 1 for length in self._lengths]
        if self._places() > self._size[1]:
            self._move(range(len(tokens)), self._places())
        self._memory.views(self._size).ids_B.copy_(torch.tensor(tokens))
        return self._memory.run(self._size, self._advance) if self._graphs else self._advance()

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, in this order."""
        self._lengths = [self._lengths[row] for row in rows]
        self._move(rows, self._size[1])

    def _move(self, rows: Sequence[int], num_places: int) -> None:
        """Puts some rows, in this order, into views of another size, which lie over those of before."""
        size, index = (len(rows), num_places), torch.tensor(rows, device=self._device)
        self._memory.make_room(size)
        before, after = self._memory.views(self._size), self._memory.views(size)
        after.position_B.copy_(before.position_B[index])
        for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
            new.copy_(pad(old[index], (0, 0, 0, num_places - self._size[1])))
        self._size = size

    def _places(self) -> int:
        """Returns how many places the cache needs for what the rows have now."""
        return places_for(min(max(self._lengths), self._max_tokens))

    def _parts(self) -> list[range]:
        """Returns rows that are read together."""
        parts: list[range] = []
        tokens = 0
        for row, length in enumerate(self._lengths):
            if not parts or tokens + length > self._most_read:
                parts.append(range(row, row))
                tokens = 0
            tokens += length
            parts[-1] = range(parts[-1].start, row + 1)
        return parts

    def _read(self, prompts: Sequence[Sequence[int]], rows: range, views: StepViews) -> Tensor:
        inputs = pack_sequences([prompts[row] for row in rows]).to(self._device)
        ends = inputs.cu_seqlens[1:].long()
        # the host knows how many tokens there are; the device need not be asked
        row_T = torch.tensor(rows, device=self._device).repeat_interleave(
            torch.diff(inputs.cu_seqlens), output_size=len(inputs.ids_T)
        )
        place_T = inputs.position_T.long()
        # more than the longest has: equally long prompts would go to cuDNN, which prepares itself for every new length
        max_seqlen = places_for(inputs.max_seqlen + 1)

        def attend(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
            views.keys[layer][row_T, :, place_T] = k_TKH
            views.values[layer][row_T, :, place_T] = v_TKH
            return ops.packed_attention(q_TNH, k_TKH, v_TKH, inputs.cu_seqlens, max_seqlen, backend=self._backend)

        return self._forward(inputs, attend, ends - 1)

    def _advance(self) -> Tensor:
        """Returns the logits after the tokens in `ids_B`, at `position_B`, and moves on by one."""
        (num_rows, seen), views = self._size, self._memory.views(self._size)
        position_B, row_B = views.position_B, torch.arange(num_rows, device=self._device)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            seen = min(max(self._lengths), self._max_tokens)
        group = self._sizes.num_heads // self._sizes.num_kv_heads
        is_past_BS = torch.arange(seen, device=self._device) <= position_B[:, None]
        # written out for the G queries: kernels want a mask whose rows are apart in memory
        mask_B1GS = is_past_BS[:, None, None].expand(-1, 1, group, -1).contiguous()

        def attend(layer: int, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor) -> Tensor:
            keys, values = views.keys[layer], views.values[layer]
            keys[row_B, :, position_B] = k_BKH
            values[row_B, :, position_B] = v_BKH
            q_BKGH = q_BNH.view(num_rows, -1, group, q_BNH.shape[2])
            y_BKGH = scaled_dot_product_attention(
                q_BKGH, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask_B1GS
            )
            return y_BKGH.flatten(1, 2)

        inputs = PackedInputs(
            ids_T=views.ids_B, position_T=position_B.to(torch.int32),
            cu_seqlens=torch.arange(num_rows + 1, dtype=torch.int32, device=self._device), max_seqlen=1,
            place_N=row_B, target_N=row_B, num_targets=0,
        )  # fmt: skip
        # not cuDNN's attention, which prepares itself for every new size
        with nullcontext() if on_cpu else sdpa_kernel(STEP_KERNELS):
            logits_BV = self._forward(inputs, attend, None)
        position_B.add_(1).clamp_(max=self._max_tokens - 1)
        return logits_BV

"""Frozen linear maps that share an input (q, k and v; gate and up), with their adapters: one product for all of them.

Two forms of the same map, chosen when an adapter is attached and never changed by anything else:

    separate    y = x Wᵀ + s (d(x) Aᵀ) Bᵀ       as PEFT computes it; d is dropout, a mask of its own for every map
    folded      y = x W'ᵀ,  W' = W + s B A      without dropout; W' is formed in float32 and rounded once

Folded, the forward and the gradient of x are bare products, and the adapter costs nothing there but its share of the
kernel that writes the matrix. Its limit is the rounding of W': in bfloat16 the step of W is 2**-9 of W, and what s B A
changes below half of that is lost for this product (not for the next update: A and B are float32). With rounding to
nearest the error has mean zero over a matrix; tests/invariant/test_fast_trajectories.py measures what is left of it.

Where matrices come from, also two ways:

    stream      written at every use into one buffer that all groups share; nothing is kept
    resident    written once and kept in the compute dtype; folded, again whenever the adapter has changed (`refold`)

Both give the same numbers. `stream-fp8` and `resident-fp8` multiply in FP8 instead, with the adapter in columns of its
own: `model/fp8_products.py`.

The gradients of A and B are the same in every form and need neither W nor W': with x the map's input, dA = s uᵀ x and
dB = s dyᵀ h, where h = x Aᵀ and u = dy B, plain products. The A of maps that share x are stacked, so x is read twice
for all of them. For Llama 2 7B, rank 16 and 8,192 tokens on an H200 they take 0.6 ms a layer, near the time
of reading their operands; kernels of our own that read each operand once were 1.3 to 4 times slower.

Products read A and B in the compute dtype, as autocast has it; `refresh` makes those copies once an optimiser step.

With dropout every map has an input of its own, made where it is needed and never kept (`model/dropout.py`). With DoRA
the rows of W' are scaled as well (`model/dora.py`), in the folded form alone.

Legend: T tokens, I in features, O out features of all maps of a group together, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from chulengo.errors import ConfigError
from chulengo.kernels import ops
from chulengo.kernels.reference.fp8 import empty_copies
from chulengo.kernels.reference.nf4 import NF4Weight
from chulengo.model.allocator import OwnMemory
from chulengo.model.dora import Rescaling, empty_rescaling, row_norms
from chulengo.model.dropout import MaskSeed
from chulengo.model.fp8_products import (
    FP8_POLICIES,
    Fp8Adapter,
    Fp8Group,
    Fp8Matrices,
    Rows,
    Scales,
    column_table,
    fp8_group,
)
from chulengo.model.graph_capture import in_lanes

WEIGHT_POLICIES = ("stream", "resident", *FP8_POLICIES)
FP8_LANES = 4  # groups whose adapters are copied at once: each kernel uses few of a GPU's processors


@dataclass(slots=True, eq=False)
class Factors:
    """One map's adapter: A [R, I] and B [O, R], and DoRA's magnitude [O] where it has one, float32."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    magnitude_O: nn.Parameter | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Returns A, B and the magnitude, if there is one."""
        return [self.a_RI, self.b_OR] + ([] if self.magnitude_O is None else [self.magnitude_O])


@dataclass(slots=True, eq=False)
class FactorCopies:
    """The adapters of a group in the compute dtype. `stacked_a_SI` holds the A of all adapted maps, S rows together."""

    stacked_a_SI: Tensor
    a_RI: list[Tensor | None]  # views of it, one for each map
    stacked_b_OR: Tensor  # as wide as the largest rank
    b_OR: list[Tensor | None]  # views of it
    rescaling: list[Rescaling | None]  # of maps with a magnitude


@dataclass(slots=True, eq=False)
class LinearGroup:
    """Linear maps with one input.

    Attributes:
        names: module paths, as the Hugging Face model has them, without `.weight`.
        weights: [O_j, I] each: NF4, or plain in the compute dtype.
        bias_O: of all maps, or None when none has one.
        factors: the adapter of each map, or None.
        resident_OI: the matrix of all maps, where the policy keeps it.
        copies: of the factors; None before the first `Matrices.refresh`.
        fp8: the group in e4m3, where the policy multiplies in it.
        host_weights: copies of the weights in the host's memory, made before they are wanted there, or none.
        joined_OI: the matrix whose rows the weights are, where none is quantised.
    """

    names: tuple[str, ...]
    weights: list[NF4Weight | Tensor]
    bias_O: Tensor | None
    factors: list[Factors | None]
    resident_OI: Tensor | None = None
    copies: FactorCopies | None = None
    fp8: Fp8Group | None = None
    host_weights: list[NF4Weight | Tensor] = field(default_factory=list)
    joined_OI: Tensor | None = None

    @property
    def widths(self) -> list[int]:
        """Out features of each map."""
        return [weight.shape[0] for weight in self.weights]

    @property
    def in_features(self) -> int:
        """In features, the same for all maps."""
        return self.weights[0].shape[1]

    @property
    def num_kept(self) -> int:
        """How many matrices of the group are kept, in 16 bits or in FP8."""
        copies = () if self.fp8 is None else (self.fp8.forward_OW, self.fp8.backward_IW)
        return sum(matrix is not None for matrix in (self.resident_OI, *copies))

    @property
    def rescaled(self) -> bool:
        """Whether a map has a magnitude, whose gradient needs the map's output."""
        return any(pair is not None and pair.magnitude_O is not None for pair in self.factors)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the A of all adapted maps, then their B, then their magnitudes: so all A can be one matrix."""
        pairs = [pair for pair in self.factors if pair is not None]
        magnitudes = [pair.magnitude_O for pair in pairs if pair.magnitude_O is not None]
        return [*[pair.a_RI for pair in pairs], *[pair.b_OR for pair in pairs], *magnitudes]


@dataclass(frozen=True, slots=True)
class LoraForm:
    """How the adapters of a model enter its products."""

    scale: float
    dropout: float
    folded: bool

    def drops(self, seed: MaskSeed | None) -> bool:
        """Whether inputs are dropped in a pass with this seed."""
        return bool(self.dropout) and seed is not None


class Matrices:
    """Makes the matrix of a group for a product, by the weights policy."""

    def __init__(
        self, *, policy: str, dtype: torch.dtype, backend: str, lasting: OwnMemory | None = None
    ) -> None:
        """Holds nothing yet; the buffer grows to the largest group at first use.

        Args:
            policy: one of `WEIGHT_POLICIES`.
            dtype: of products.
            backend: of the kernels.
            lasting: where resident matrices go; None: where all other tensors are.
        """
        if policy not in WEIGHT_POLICIES:
            raise ConfigError(f"The weights policy is {policy!r}.", allowed=", ".join(WEIGHT_POLICIES))
        self.policy, self.dtype, self.backend = policy, dtype, backend
        self._lasting = OwnMemory(torch.device("cpu")) if lasting is None else lasting
        self.form: LoraForm | None = None
        self.fp8: Fp8Matrices | None = None
        if policy in FP8_POLICIES:
            self.fp8 = Fp8Matrices(resident=policy == "resident-fp8", dtype=dtype, backend=backend, lasting=lasting)
        self._buffer: Tensor | None = None

    def rows(self, x_TK: Tensor, group: LinearGroup) -> Rows | None:
        """Returns an input or gradient of a group's product in e4m3, None where products are in the compute dtype."""
        return None if self.fp8 is None else self.fp8.rows(x_TK, self.fp8_of(group))

    def fp8_of(self, group: LinearGroup) -> Fp8Group:
        """Returns the group in e4m3, its scales made at first use."""
        if group.fp8 is None:
            group.fp8 = fp8_group(group.weights, group.host_weights)
        return group.fp8

    def prepare_fp8(self, groups: Iterable[LinearGroup]) -> None:
        """Makes what products in FP8 need of the weights alone: scales, and copies that wait in the host's memory.

        For Llama 2 7B this takes 2.4 s of the first step, or of a thread while the host compiles kernels.
        """
        for group in groups if self.fp8 is not None else ():
            self.fp8_of(group)
            if self.policy == "resident-fp8" and not group.host_weights:
                group.host_weights.extend(weight.to("cpu") for weight in group.weights)

    @property
    def folded(self) -> bool:
        """Whether the adapter is part of the matrix."""
        return self.form is not None and self.form.folded

    def of(self, group: LinearGroup) -> Tensor:
        """Returns the matrix [O, I], the adapter in it when folded; only valid until the next call."""
        if (as_it_is := self._as_it_is(group)) is not None:
            return as_it_is
        if self.policy == "resident":
            if group.resident_OI is None:
                group.resident_OI = self._written(group, None)
            return group.resident_OI
        return self._written(group, self._buffer_for(group))

    def fill_fp8(self, groups: Sequence[LinearGroup]) -> None:
        """Writes the copies that `resident-fp8` keeps, a group at a time, each in the place of the weights before it.

        In a first step they would stand beside activations, whose memory they could not have: see `OwnMemory.made`. The
        first group's copy for dx is left out, since nobody asks for the gradient of what it reads.
        """
        if self.fp8 is not None and self.fp8.resident:
            for index, group in enumerate(groups):
                self.fp8.fill(self.fp8_of(group), transposed=index > 0)

    def unwritten_bytes(self, groups: Iterable[LinearGroup]) -> int:
        """Returns what these groups' matrices in the compute dtype will take beside what is there, once all are used.
        """
        left = [group for group in groups if group.resident_OI is None and self._as_it_is(group) is None]
        sizes = [sum(group.widths) * group.in_features * self.dtype.itemsize for group in left]
        if self.policy == "resident":
            return sum(sizes)
        return max(0, max(sizes, default=0) - (0 if self._buffer is None else self._buffer.nbytes))

    def refresh(self, groups: Iterable[LinearGroup]) -> None:
        """Copies the factors again, and writes resident folded matrices again, after the adapter has changed."""
        groups = list(groups)
        if self.policy == "stream" and any(group.rescaled for group in groups):
            # norms are made in the buffer, and a graph of this work must not see it grow afterwards
            self._buffer_for(max(groups, key=lambda group: sum(group.widths) * group.in_features))
        groups = [group for group in groups if group.parameters()]
        copies, factors = [], []
        for group in groups:
            if group.copies is None:
                group.copies = _empty_copies(group, self.dtype)
            places = [(group.copies.a_RI[i], group.copies.b_OR[i]) for i in range(len(group.factors))]
            copies += [place for pair in places for place in pair if place is not None]
            factors += [x.detach() for pair in group.factors if pair is not None for x in (pair.a_RI, pair.b_OR)]
        torch._foreach_copy_(copies, factors)
        if self.fp8 is not None:
            in_lanes([partial(self._refresh_fp8, self.fp8, group) for group in groups], FP8_LANES)
        for group in groups:
            if group.rescaled:
                self._rescale(group)
            if self.folded and group.resident_OI is not None:
                self._written(group, group.resident_OI)

    def release(self, groups: Iterable[LinearGroup]) -> None:
        """Forgets resident matrices and copies: the form, or which maps have an adapter, has changed."""
        for group in groups:
            if group.fp8 is not None:
                group.fp8.forget()
            group.resident_OI = group.copies = None

    def _refresh_fp8(self, fp8: Fp8Matrices, group: LinearGroup) -> None:
        copies, side = group.copies, self.fp8_of(group)
        assert copies is not None
        assert self.form is not None
        if side.adapter is None:
            a_SI, b_OR = copies.stacked_a_SI, copies.stacked_b_OR
            ranks = tuple(0 if a is None else len(a) for a in copies.a_RI)
            table = column_table(tuple(group.widths), ranks, a_SI.device)
            empty = empty_copies(len(a_SI), group.in_features, len(b_OR), a_SI.device)
            side.adapter = Fp8Adapter(a_SI, b_OR, table, empty)
        fp8.refresh(side, self.form.scale)

    def row_norms(self, group: LinearGroup) -> list[Tensor]:
        """Returns the norms of W + s B A's rows of each map, float32 [O_j]; of W's before the first `refresh`."""
        if self.policy == "resident":
            group.resident_OI = self._written(group, group.resident_OI, rescaled=False)
            whole_OI = group.resident_OI
        else:
            whole_OI = self._written(group, self._buffer_for(group), rescaled=False)
        return [row_norms(part_OI) for part_OI in torch.split(whole_OI, group.widths)]

    def _rescale(self, group: LinearGroup) -> None:
        assert group.copies is not None, "made by `refresh`"
        parts = zip(group.factors, group.copies.rescaling, group.copies.b_OR, self.row_norms(group), strict=True)
        for pair, rescaling, b_OR, norm_O in parts:
            if pair is not None and pair.magnitude_O is not None and rescaling is not None and b_OR is not None:
                rescaling.refresh(pair.magnitude_O.detach(), norm_O, b_OR)

    def _as_it_is(self, group: LinearGroup) -> Tensor | None:
        """Returns what is a group's matrix without being written: weights that are not quantised; else None."""
        if self._folds(group):
            return None
        only = group.weights[0] if len(group.weights) == 1 else None
        return only if isinstance(only, Tensor) else group.joined_OI

    def _folds(self, group: LinearGroup) -> bool:
        return self.folded and any(pair is not None for pair in group.factors)

    def _buffer_for(self, group: LinearGroup) -> Tensor:
        rows, columns = sum(group.widths), group.in_features
        if self._buffer is None or self._buffer.numel() < rows * columns:
            self._buffer = None  # not beside the larger one
            self._buffer = torch.empty(rows * columns, dtype=self.dtype, device=_device(group))
        return self._buffer[: rows * columns].view(rows, columns)

    def _written(self, group: LinearGroup, out_OI: Tensor | None, *, rescaled: bool = True) -> Tensor:
        if out_OI is None:
            shape, device = (sum(group.widths), group.in_features), _device(group)
            out_OI = self._lasting.made(lambda: torch.empty(shape, dtype=self.dtype, device=device))
        parts = torch.split(out_OI, group.widths)
        for index, (part, weight) in enumerate(zip(parts, group.weights, strict=True)):
            copies = group.copies if self.folded else None
            a, b = (copies.a_RI[index], copies.b_OR[index]) if copies is not None else (None, None)
            rescaling = copies.rescaling[index] if copies is not None and rescaled else None
            rows_O = None if rescaling is None else rescaling.scale_O
            scale = self.form.scale if self.form is not None else 1.0
            if isinstance(weight, NF4Weight):
                ops.dequantize_nf4(
                    weight, self.dtype, lora_a_RI=a, lora_b_OR=b, lora_scale=scale, row_scale_O=rows_O, out=part,
                    backend=self.backend,
                )
            elif a is not None and b is not None:
                value_OI = weight.float() + scale * (b.float() @ a.float())
                part.copy_(value_OI if rows_O is None else value_OI * rows_O[:, None])
            else:
                part.copy_(weight)
        return out_OI


def multiply(
    x_TI: Tensor | None, group: LinearGroup, matrices: Matrices, seed: MaskSeed | None, rows: Rows | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns all maps of a group on one input, [T, O], and h = x Aᵀ [T, S] where it was made; outside of autograd.

    Args:
        x_TI: the input, which products in FP8 do without.
        group: the maps.
        matrices: where their matrix comes from.
        seed: of the dropout masks; None: no dropout.
        rows: the input in e4m3, where products are in FP8.
    """
    form, copies = matrices.form, group.copies
    if matrices.fp8 is not None and rows is not None:
        y_TO, h_TS = matrices.fp8.multiply(rows, matrices.fp8_of(group))
        return y_TO if group.bias_O is None else y_TO.add_(group.bias_O), h_TS
    assert x_TI is not None
    y_TO = nn.functional.linear(x_TI, matrices.of(group), group.bias_O)
    if form is None or form.folded or copies is None:
        return y_TO, None
    h_TS = None if form.drops(seed) else x_TI @ copies.stacked_a_SI.t()
    for index, y_TN, a_RI, b_OR, columns in adapted_maps(group, copies, torch.split(y_TO, group.widths, dim=1)):
        h_TR = dropped_input(x_TI, matrices, seed, index) @ a_RI.t() if h_TS is None else h_TS[:, columns]
        y_TN.addmm_(h_TR, b_OR.t(), alpha=form.scale)
    return y_TO, h_TS


def rank_input(group: LinearGroup, matrices: Matrices, rows: Rows | None) -> Tensor | None:
    """Returns h = x Aᵀ [T, S] as `multiply` makes it, where that is in FP8; else None, and it is made when needed."""
    return None if matrices.fp8 is None or rows is None else matrices.fp8.rank_input(rows, matrices.fp8_of(group))


def rank_gradient(
    dy_TO: Tensor, group: LinearGroup, matrices: Matrices, seed: MaskSeed | None, rows: Rows | None = None
) -> Tensor | None:
    """Returns u = dy B (DoRA: dy g B) of all adapted maps, [T, S]; None without them, or where each drops for itself.

    Args:
        dy_TO: gradient of `multiply`'s result.
        group: the maps.
        matrices: as in the forward.
        seed: as in the forward.
        rows: dy in e4m3, where products are in FP8.
    """
    if matrices.fp8 is not None and rows is not None:
        return matrices.fp8.rank_gradient(rows, matrices.fp8_of(group))
    form, copies = matrices.form, group.copies
    if form is None or copies is None or form.drops(seed):
        return None
    u_TS = dy_TO.new_empty((dy_TO.shape[0], len(copies.stacked_a_SI)))
    for index, dy_TN, _, b_OR, columns in adapted_maps(group, copies, torch.split(dy_TO, group.widths, dim=1)):
        rescaling = copies.rescaling[index]
        torch.mm(dy_TN, b_OR if rescaling is None else rescaling.b_OR, out=u_TS[:, columns])
    return u_TS


def input_gradient(
    dy_TO: Tensor, u_TS: Tensor | None, group: LinearGroup, matrices: Matrices, seed: MaskSeed | None,
    rows: Rows | None = None,
) -> Tensor:
    """Returns dx [T, I]: dy W', or dy W + s d(u A).

    Args:
        dy_TO: gradient of `multiply`'s result.
        u_TS: `rank_gradient` of it.
        group: the maps.
        matrices: as in the forward.
        seed: as in the forward.
        rows: dy in e4m3, where products are in FP8.
    """  # fmt: skip
    form, copies = matrices.form, group.copies
    if matrices.fp8 is not None and rows is not None:
        return matrices.fp8.multiply_transposed(rows, matrices.fp8_of(group))
    dx_TI = dy_TO @ matrices.of(group)
    if form is None or form.folded or copies is None:
        return dx_TI
    if u_TS is not None:
        return dx_TI.addmm_(u_TS, copies.stacked_a_SI, alpha=form.scale)
    for index, dy_TN, a_RI, b_OR, _ in adapted_maps(group, copies, torch.split(dy_TO, group.widths, dim=1)):
        assert seed is not None, "u is made for all maps where nothing is dropped"
        kernel = ops.implementation("dropout", dx_TI, matrices.backend)
        kernel.add_(dx_TI, (dy_TN @ b_OR) @ a_RI, form.scale, form.dropout, seed.step_1, seed.place(index))
    return dx_TI


def unscaled_input_gradient(
    dy_TO: Tensor, u_TS: Tensor | None, group: LinearGroup, matrices: Matrices, seed: MaskSeed | None,
    rows: Rows | None = None,
) -> tuple[Tensor, Scales | None]:  # fmt: skip
    """Returns dx as `input_gradient` does, in FP8 without its scales, and those, for the norm's backward to read."""
    if matrices.fp8 is not None and rows is not None:
        return matrices.fp8.unscaled_transposed(rows, matrices.fp8_of(group))
    return input_gradient(dy_TO, u_TS, group, matrices, seed, rows), None


def _empty_copies(group: LinearGroup, dtype: torch.dtype) -> FactorCopies:
    ranks = [0 if pair is None else pair.a_RI.shape[0] for pair in group.factors]
    stacked_a_SI = torch.empty((sum(ranks), group.in_features), dtype=dtype, device=_device(group))
    stacked_b_OR = torch.empty((sum(group.widths), max(ranks)), dtype=dtype, device=stacked_a_SI.device)
    parts = zip(torch.split(stacked_a_SI, ranks), torch.split(stacked_b_OR, group.widths), ranks, strict=True)
    pairs = [(a_RI, b_OR[:, :rank]) if rank else (None, None) for a_RI, b_OR, rank in parts]
    rescaling = [
        None if b_OR is None or pair is None or pair.magnitude_O is None else empty_rescaling(b_OR)
        for (_, b_OR), pair in zip(pairs, group.factors, strict=True)
    ]
    return FactorCopies(
        stacked_a_SI, [a_RI for a_RI, _ in pairs], stacked_b_OR, [b_OR for _, b_OR in pairs], rescaling
    )


def adapted_maps(
    group: LinearGroup, copies: FactorCopies, values: Iterable[Tensor]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, slice]]:
    """Yields (index, value, A, B, place in the stack) of the maps that have an adapter."""
    start = 0
    for index, (value, a_RI, b_OR) in enumerate(zip(values, copies.a_RI, copies.b_OR, strict=True)):
        if a_RI is not None and b_OR is not None:
            yield index, value, a_RI, b_OR, slice(start, start + len(a_RI))
            start += len(a_RI)


def dropped_input(x_TI: Tensor, matrices: Matrices, seed: MaskSeed | None, index: int) -> Tensor:
    """Returns the input [T, I] of one map of a group, with that map's mask."""
    form = matrices.form
    assert form is not None, "asked for only where there is an adapter"
    assert seed is not None, "and where its inputs are dropped"
    return ops.dropout(x_TI, form.dropout, seed.step_1, seed.place(index), backend=matrices.backend)


def _device(group: LinearGroup) -> torch.device:
    weight = group.weights[0]
    return weight.packed.device if isinstance(weight, NF4Weight) else weight.device

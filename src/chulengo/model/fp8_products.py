"""Frozen products in FP8: a group's matrix in e4m3, once for y = x Wᵀ and once, transposed, for dx = dy W.

Each copy has a scale for each of its rows. The adapter is not folded in: an update s B A is far below a step of e4m3
(2**-4 of a value), so most of it would be lost, or turned into noise by every optimiser step. It rides beside the
matrix in columns of its own, and one product computes

    y  = x Wᵀ  + s h Bᵀ      h = x Aᵀ
    dx = dy W  + s u A       u = dy B

h and u are needed for the gradients of A and B anyway (dA = s uᵀ x, dB = s dyᵀ h), so the adapter costs its columns:
2 % of the product at rank 16 (`kernels/columns.py` has the figures, `kernels/reference/fp8.py` the formulas). They are
products in FP8 too, which read half the bytes.

Where copies come from, as in 16 bits:

    stream-fp8      written from NF4 at every use, into one buffer that all groups share
    resident-fp8    both written once and kept: 2 bytes a weight, as a 16-bit matrix has

What it costs in quality is measured by `benchmarks/fp8_gate.py` and told in docs/explanation/fast-engine.md. It is
never chosen by itself.

Legend: T tokens, I in features, O out features of all maps of a group together, S ranks of all maps together, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from chulengo.kernels import ops
from chulengo.kernels.columns import num_columns
from chulengo.kernels.reference import nf4
from chulengo.kernels.reference.fp8 import AdapterCopies, ColumnTable
from chulengo.model.allocator import OwnMemory

FP8_POLICIES = ("stream-fp8", "resident-fp8")
IN_16_BITS = "--set model.weights_policy=auto"


class Rows(NamedTuple):
    """An operand in e4m3, [T, K + columns], and the scale of each row, float32 [T, 1]."""

    values: Tensor
    scale_T1: Tensor


# of the rows [T, 1] and of the columns [I, 1] of a product that was made without them
Scales = tuple[Tensor, Tensor]


class HandedRows:
    """A gradient in e4m3 on its way from the function that makes it to the one that multiplies by it.

    Between them is autograd, which hands on the 16-bit tensor alone. Rows are found again by that very tensor, which is
    held until then, so that no other can be in its place; for any other tensor they are not, and have to be made.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Rows] | None = None

    def put(self, x_TK: Tensor, rows: Rows) -> None:
        """Keeps the rows of a tensor until the next `take`."""
        self._kept = x_TK, rows

    def take(self, x_TK: Tensor, columns: int) -> Rows | None:
        """Returns the rows of this tensor, if it is the one and they have this many columns beside the values."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0] is not x_TK or kept[1].values.shape[1] != x_TK.shape[1] + columns:
            return None
        return kept[1]


@dataclass(slots=True, eq=False)
class Fp8Adapter:
    """What an adapter adds to the copies of one group.

    Attributes:
        a_SI: A of all maps, stacked, in the compute dtype.
        b_OR: B of all maps, stacked.
        table: which of B's values stand where in the columns.
        copies: in e4m3, and the columns' factors.
    """

    a_SI: Tensor
    b_OR: Tensor
    table: ColumnTable
    copies: AdapterCopies


@dataclass(slots=True, eq=False)
class Fp8Group:
    """The e4m3 side of a group of maps.

    Attributes:
        weights: [O_j, I] each, the linear group's own list; in the host's memory while both copies are kept.
        host_weights: the linear group's list of their copies there, made ahead, or empty.
        scale_O1: float32, of the rows of all maps.
        scale_I1: float32, of the columns, the largest of all maps.
        adapter: or None.
        forward_OW: the copy for y, where it is kept.
        backward_IW: the copy for dx, where it is kept.
    """

    weights: list[nf4.NF4Weight | Tensor]
    host_weights: list[nf4.NF4Weight | Tensor]
    scale_O1: Tensor
    scale_I1: Tensor
    adapter: Fp8Adapter | None = None
    forward_OW: Tensor | None = None
    backward_IW: Tensor | None = None

    @property
    def columns(self) -> int:
        """Columns beside the values of each row."""
        return 0 if self.adapter is None else num_columns(len(self.adapter.a_SI))

    @property
    def is_complete(self) -> bool:
        """Whether both copies are kept, which take the weights' place on the device."""
        return self.forward_OW is not None and self.backward_IW is not None

    def leave_to_copies(self) -> None:
        """Moves the weights to the host's memory, for everybody who has the list."""
        self.weights[:] = self.host_weights or [weight.to("cpu") for weight in self.weights]
        self.host_weights.clear()

    def forget(self) -> None:
        """Has weights and scales and nothing else, as at first: another adapter, or form of this one, is to come."""
        if self.is_complete:
            self.host_weights[:] = self.weights
            self.weights[:] = [weight.to(self.scale_O1.device) for weight in self.weights]
        self.adapter = self.forward_OW = self.backward_IW = None


def fp8_group(weights: list[nf4.NF4Weight | Tensor], host_weights: list[nf4.NF4Weight | Tensor]) -> Fp8Group:
    """Returns a group with the scales of its weights, without an adapter."""
    rows, columns = zip(*(_scales(weight) for weight in weights), strict=True)
    return Fp8Group(weights, host_weights, torch.cat(rows), torch.stack(columns).amax(0))


@lru_cache(maxsize=16)  # groups of all layers are alike
def column_table(widths: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> ColumnTable:
    """Returns where the values of each map's B stand: in its rows, and in columns of its own."""
    parts = []
    end = 0
    for width, rank in zip(widths, ranks, strict=True):
        parts += [(end, end + width, column) for column in range(rank)]
        end += width
    first, last, column = torch.tensor(parts, dtype=torch.int32, device=device).view(-1, 3).unbind(1)
    return ColumnTable(first.contiguous(), last.contiguous(), column.contiguous())


class Fp8Matrices:
    """Makes the copies of groups, by the policy, and multiplies by them."""

    def __init__(
        self, *, resident: bool, dtype: torch.dtype, backend: str, lasting: OwnMemory | None = None
    ) -> None:
        """Holds nothing yet; the buffer grows to the largest copy at first use. Kept copies go to `lasting`."""
        self.resident, self.dtype, self.backend = resident, dtype, backend
        self._lasting = OwnMemory(torch.device("cpu")) if lasting is None else lasting
        self._buffer: Tensor | None = None

    def rows(self, x_TK: Tensor, group: Fp8Group) -> Rows:
        """Returns an operand of a group's product, with room for the adapter's columns."""
        return Rows(*ops.implementation("fp8", x_TK, self.backend).quantize_rows(x_TK, group.columns))

    def multiply(self, rows: Rows, group: Fp8Group) -> tuple[Tensor, Tensor | None]:
        """Returns x Wᵀ + s h Bᵀ [T, O] and h [T, S], None without an adapter; `rows`, which are x, get h's columns."""
        h_TS = self.rank_input(rows, group)
        kernels, copy_OW = ops.implementation("fp8", rows.values, self.backend), self._copy(group, transposed=False)
        return kernels.product(*rows, copy_OW, group.scale_O1, self.dtype), h_TS

    def rank_input(self, rows: Rows, group: Fp8Group) -> Tensor | None:
        """Returns h = x Aᵀ [T, S], None without an adapter, and gives `rows`, which are x, its columns."""
        if group.adapter is None:
            return None
        copies = group.adapter.copies
        return self._rank_product(rows, copies.a8_SI, copies.a_scale_S1, copies.factors_4S[0])

    def rank_gradient(self, rows: Rows, group: Fp8Group) -> Tensor | None:
        """Returns u = dy B [T, S], None without an adapter, and gives `rows`, which are dy, its columns."""
        if group.adapter is None:
            return None
        copies = group.adapter.copies
        return self._rank_product(rows, copies.b8_SO, copies.b_scale_S1, copies.factors_4S[2])

    def multiply_transposed(self, rows: Rows, group: Fp8Group) -> Tensor:
        """Returns dy W + s u A [T, I], of rows that have been through `rank_gradient`."""
        kernels, copy_IW = ops.implementation("fp8", rows.values, self.backend), self._copy(group, transposed=True)
        dx_TI: Tensor = kernels.product(*rows, copy_IW, group.scale_I1, self.dtype)
        return dx_TI

    def unscaled_transposed(self, rows: Rows, group: Fp8Group) -> tuple[Tensor, Scales]:
        """Returns `multiply_transposed` without its scales, and those, for a kernel that reads it with them."""
        kernels, copy_IW = ops.implementation("fp8", rows.values, self.backend), self._copy(group, transposed=True)
        return kernels.unscaled_product(rows.values, copy_IW, self.dtype), (rows.scale_T1, group.scale_I1)

    def refresh(self, group: Fp8Group, lora_scale: float) -> None:
        """Makes the factors of the columns again, and the columns of kept copies, after the adapter has changed."""
        adapter = group.adapter
        if adapter is None:
            return
        kernels = ops.implementation("fp8", adapter.a_SI, self.backend)
        scales = (group.scale_O1, group.scale_I1)
        kernels.copy_adapter(adapter.a_SI, adapter.b_OR, adapter.table, *scales, lora_scale, adapter.copies)
        if group.forward_OW is not None:
            self._write_columns(group, group.forward_OW, transposed=False)
        if group.backward_IW is not None:
            self._write_columns(group, group.backward_IW, transposed=True)

    def fill(self, group: Fp8Group, *, transposed: bool) -> None:
        """Writes the copies of a group that are kept: the one for y, and on demand the one for dx."""
        for which in (False, True) if transposed else (False,):
            self._copy(group, transposed=which)

    def _rank_product(self, rows: Rows, copy_SK: Tensor, scale_S1: Tensor, factor_S: Tensor) -> Tensor:
        kernels = ops.implementation("fp8", rows.values, self.backend)
        low_TS: Tensor = kernels.rank_product(*rows, copy_SK, scale_S1, factor_S, self.dtype)
        return low_TS

    def _copy(self, group: Fp8Group, *, transposed: bool) -> Tensor:
        kept = group.backward_IW if transposed else group.forward_OW
        if kept is not None:
            return kept
        num_out, num_in = len(group.scale_O1), len(group.scale_I1)
        shape = (num_in, num_out + group.columns) if transposed else (num_out, num_in + group.columns)
        device = group.scale_O1.device
        if self.resident:
            copy = self._lasting.made(lambda: torch.empty(shape, dtype=torch.float8_e4m3fn, device=device))
        else:
            if self._buffer is None or self._buffer.numel() < shape[0] * shape[1]:
                self._buffer = torch.empty(shape[0] * shape[1], dtype=torch.float8_e4m3fn, device=device)
            copy = self._buffer[: shape[0] * shape[1]].view(shape)
        self._write(group, copy, transposed=transposed)
        self._write_columns(group, copy, transposed=transposed)
        if self.resident:
            self._keep(group, copy, transposed=transposed)
        return copy

    def _keep(self, group: Fp8Group, copy: Tensor, *, transposed: bool) -> None:
        if transposed:
            group.backward_IW = copy
        else:
            group.forward_OW = copy
        if group.is_complete:
            group.leave_to_copies()

    def _write(self, group: Fp8Group, copy: Tensor, *, transposed: bool) -> None:
        start = 0
        for weight in group.weights:
            end = start + weight.shape[0]
            out = copy[:, start:end] if transposed else copy[start:end, : weight.shape[1]]
            scale = group.scale_I1 if transposed else group.scale_O1[start:end]
            if isinstance(weight, nf4.NF4Weight):
                ops.dequantize_nf4_fp8(weight, scale, out, transposed=transposed, backend=self.backend)
            else:
                values = weight.t() if transposed else weight
                out.copy_((values.float() * (1.0 / scale)).clamp(-nf4.E4M3_LARGEST, nf4.E4M3_LARGEST).to(out.dtype))
            start = end

    def _write_columns(self, group: Fp8Group, copy: Tensor, *, transposed: bool) -> None:
        adapter = group.adapter
        if adapter is None:
            return
        kernels = ops.implementation("fp8", copy, self.backend)
        start = copy.shape[1] - group.columns
        if transposed:
            kernels.set_columns(copy, group.scale_I1, start, adapter.a_SI.t(), adapter.copies.factors_4S[3])
        else:
            kernels.set_columns(copy, group.scale_O1, start, adapter.b_OR, adapter.copies.factors_4S[1], adapter.table)


def _scales(weight: nf4.NF4Weight | Tensor) -> tuple[Tensor, Tensor]:
    return nf4.fp8_scales(weight) if isinstance(weight, nf4.NF4Weight) else nf4.matrix_scales(weight)
